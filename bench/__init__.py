"""Measurements that need minutes and gigabytes; not part of the tests."""
