"""Records, scores and comparisons as files: whole or absent, added and never edited.

From the ground up: ``digest`` (canonical JSON and its SHA-256), ``files`` (atomic writes, locks),
``scores`` (safetensors), ``comparisons`` (of seeds), ``record_json`` (a record's text, identity and
address), ``published`` (packed tables), ``records`` (the store that reads both and writes its own
part), ``publication`` (packing) and ``score_archive``; ``environment`` says where a number came
from.
"""
