"""Records, scores and comparisons as files: whole or absent, added and never edited.

From the ground up: ``digest`` (canonical JSON and its SHA-256), ``guarded`` (reading what may be
damaged), ``plausibility`` (numbers that cannot be), ``files`` (atomic writes, locks, output),
``scores`` (safetensors), ``comparisons`` (of seeds), ``record_json`` (a record's text, identity and
address), ``published`` (packed tables), ``records`` (the store that reads both and writes its own
part), ``publication`` (packing) and ``score_archive``; ``environment`` says where a number came
from. Apart stand ``decisions``, what a person says of the rows of a data set, and ``spreadsheet``,
which writes csv.
"""
