"""The only opener of files: mapped weights, arrays kept on disk, the cache, staging, and models written whole.

files.py      opening, mapping, hashing, reading; writing whole or not at all; OSError -> a sentence
arrays.py     named arrays in one safetensors file, read mapped; npz without pickle
cache.py      what a killed run finds again; scratch folders
staging.py    a published folder appears in one rename or not at all; its check
folders.py    new folders, copies
scripts.py    functions out of a user's Python file
models.py     an ONNX model written weight by weight
"""

from __future__ import annotations

from lrcompile.store.arrays import load_array, open_array, read_arrays, read_npz, save_array, write_arrays
from lrcompile.store.cache import Cache
from lrcompile.store.files import (
    io_errors,
    map_file,
    read_bytes,
    read_json,
    read_text,
    sha256,
    whole_file,
    write_bytes,
    write_json,
    write_text,
)
from lrcompile.store.folders import copy_file, copy_folder, default_cache, new_folder, remove_folder
from lrcompile.store.models import save_model
from lrcompile.store.scripts import load_function
from lrcompile.store.staging import MANIFEST, check_folder, check_out, fingerprints, staging

__all__ = [
    "MANIFEST",
    "Cache",
    "check_folder",
    "check_out",
    "copy_file",
    "copy_folder",
    "default_cache",
    "fingerprints",
    "io_errors",
    "load_array",
    "load_function",
    "map_file",
    "new_folder",
    "open_array",
    "read_arrays",
    "read_bytes",
    "read_json",
    "read_npz",
    "read_text",
    "remove_folder",
    "save_array",
    "save_model",
    "sha256",
    "staging",
    "whole_file",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_text",
]
