"""Tests that compile for cards and chips that are not in this machine."""
