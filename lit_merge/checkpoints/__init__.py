"""Reading, checking, hashing and writing networks."""

from lit_merge.checkpoints.atomic import atomic_path, cache_root
from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.export import write_json, write_merged
from lit_merge.checkpoints.reading import SafetensorsFile, read_state

__all__ = ("SafetensorsFile", "atomic_path", "cache_root", "read_state", "state_digest", "write_json", "write_merged")
