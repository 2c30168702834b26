"""Measurements that a person runs; nothing here is imported by the packages."""
