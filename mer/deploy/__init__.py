"""Shards and engines on several machines as one: what starts and joins them. docs/ray.md."""
