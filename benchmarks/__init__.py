"""Speed and memory, measured: one script per question, JSON out, toy sizes run in the tests."""
