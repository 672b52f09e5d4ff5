"""Tests of benchmarks: every script runs at toy sizes."""
