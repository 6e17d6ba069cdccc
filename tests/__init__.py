"""Tests: one file a module, and whole runs on several gloo ranks."""
