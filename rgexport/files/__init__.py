"""Bytes on disk: atomic writes, hashes, typed JSON, safetensors."""
