"""The catalogue of what a peer, a disk or an attacker may do to a stream, and what here stands for each row of it.

`ROWS` maps a number to what it says, patterns of the cases that show it (of tests/golden/bad.py, and of `CASES` and
`INDEXES` of cases.py), tests that show it in another way, and, where the format has no such thing, why nothing can.
"""

from typing import NamedTuple

__all__ = ["ROWS"]


class Row(NamedTuple):
    says: str
    cases: str = ""
    tests: str = ""
    absent: str = ""


HOSTILE = "test_hostile.py::"
MUTATIONS = "test_mutations.py::"

ROWS = {
    # Framing
    1: Row("empty input", "empty one-byte"),
    2: Row("every prefix of every good stream", tests=f"{MUTATIONS}test_every_truncation_is_truncated"),
    3: Row("wrong magic", "magic magic-byte-* text-mode"),
    4: Row("byte-swapped magic", "magic-big-endian"),
    5: Row("future version, unknown features", "major* critical-feature*", "test_format.py::test_the_library_and_the_reference_reader_read_the_same"),
    6: Row("frame lengths from 0 to 2^64-1", "length-*"),
    7: Row("header checksum", "header-crc damaged-* preamble-crc"),
    8: Row("reserved bits and padding that are not zero", "reserved* header-reserved-* pad-*"),
    9: Row("bytes behind the end frame", "after-end behind-*"),
    10: Row("something else before the magic", "junk-before zip before-*"),
    11: Row("end frame missing, twice, or saying something else", "end-*"),
    12: Row("unknown frame type", "frame-type-*"),
    13: Row("numbers not in their shortest form", "wide-* *-wide-* item-canonical", absent="integers of frames have a fixed width; those of msgpack end at 64 bits"),
    14: Row("floods of frames that bring nothing", "flood-* slice-empty", "test_wire.py::test_a_hundred_thousand_tiny_frames_use_no_memory"),
    15: Row("frames lost, repeated, swapped", "sequence-* frame-lost frames-lost link", f"{MUTATIONS}test_frames_lost_repeated_or_swapped_are_out_of_sequence"),
    16: Row("two streams in a row", "two-streams", "test_wire.py::test_feed_returns_how_many_bytes_it_used"),
    # Tensor header
    17: Row("products of a shape that wrap", "shape-* item-shape-wraps-to-3 dimensions-beyond-print"),
    18: Row("product times item size wraps", "item-shape-itemsize-wraps shape-16-bytes-wrap"),
    19: Row("halves of 2^64-1 elements", "shape-*-4-bit"),
    20: Row("a dimension of 0 beside a huge one", "item-shape-zero-and-huge shape-0-and-2^62*"),
    21: Row("too many dimensions", "ndim-* item-shape-65"),
    22: Row("negative dimensions", "dimension-* item-shape-negative"),
    23: Row("payload that is not as long as it must be", "data-*short data-*long length-data-* slice-* bundle-*"),
    24: Row("16 GiB declared, 1 KiB sent", "length-16-gib-of-1-kib flood-of-claims", "test_wire.py::test_memory_follows_what_has_arrived_not_what_is_declared"),
    25: Row("dtype unknown, or not for its codec", "dtype-* item-dtype-* *-of-bool *-of-uint8 *-of-int64 *-of-float64 *-of-complex64 *-of-float8* item-codec-*-of-*"),
    26: Row("an index that points elsewhere", "index/*", "test_mutations.py::test_random_access_survives_changes_whose_checksums_hold"),
    27: Row("strides beyond the buffer", "tensor-with-strides tensor-with-offset", absent="tensors are contiguous: there are no strides"),
    28: Row("device and gradient flags", "tensor-with-device tensor-with-requires_grad tensor-with-__class__", absent="there are no such flags"),
    # Names and containers
    29: Row("a key twice", "key-twice* value-key-twice stream-key-twice", "test_properties.py::test_names_that_look_like_paths_or_attributes_are_plain_data"),
    30: Row("names that are no text or fool a terminal", "name-U+* utf-8-* item-name-* value-not-utf-8"),
    31: Row("lengths of names", "item-name-1025* name-claims-*", "test_properties.py::test_names_that_look_like_paths_or_attributes_are_plain_data"),
    32: Row("names that mean something elsewhere", tests="test_properties.py::test_names_that_look_like_paths_or_attributes_are_plain_data"),
    33: Row("the same as names of files", tests=f"{HOSTILE}test_file_names_are_never_paths"),
    34: Row("a target that is a link or a pipe", tests=f"{HOSTILE}test_a_target_is_replaced_and_never_written_through"),
    35: Row("a target that exists", tests=f"{HOSTILE}test_a_target_is_replaced_and_never_written_through {HOSTILE}test_a_refused_stream_leaves_no_file"),
    36: Row("nesting without end", "item-path-33 path-10000 value-nested-* value-*-deep parent-* root-*"),
    37: Row("aliases of what is not there, by the million", "alias-* item-alias-* flood-of-aliases", f"{HOSTILE}test_aliases_are_one_tensor {HOSTILE}test_aliases_cannot_fill_a_disk"),
    38: Row("list indexes and keys", "list-* element-* item-key-* value-key-* colliding-*", f"{HOSTILE}test_colliding_keys_cost_no_more"),
    39: Row("scalars without end", "digits-* item-key-nan value-array-claims-4-gi value-text-claims-4-gib path-claims-4-gi-*", absent="integers end at 64 bits; floats are 8 bytes"),
    40: Row("too much metadata, too many items", "length-metadata metadata-pairs flood-of-items value-of-* stream-of-* stream-with-* item-of-* item-with-*"),
    # Codecs
    41: Row("zstd: more or less than it says", "zstd-bomb zstd-content-size-* zstd-1-gib* zstd-128-mib* zstd-one-byte-* zstd-window-* planes-bomb planes-frame-short"),
    42: Row("zstd: anything but one plain frame", "zstd-skippable-* zstd-two-frames zstd-dictionary* zstd-cut* zstd-checksum zstd-garbage* zstd-reserved-* zstd-no-last-block zstd-magic-alone zstd-old-magic zstd-file-cut planes-frame-garbage planes-inside-zstd"),
    43: Row("compressed bytes more or fewer than the frame has", "zstd-longer-than-compressors-make zstd-cut zstd-garbage-behind planes-cut planes-raw-* planes-frame-cut planes-frame-saves-nothing planes-behind* planes-longer planes-marks-* planes-mode-4 planes-huffman-* planes-first-byte-3 entropy-behind entropy-bytes-behind-planes entropy-head-cut entropy-first-* entropy-longer entropy-nine-parts entropy-part* entropy-saves-nothing entropy-w* entropy-broken-numbers sparse-cut sparse-longer sparse-without-positions lowrank-short lowrank-long"),
    44: Row("count of absmax", "*-absmax-less *-absmax-more *-absmax-none *-absmax-1000 *-absmax-short *-absmax-long *-absmax-less-in-zstd *-half-of-the-codes"),
    45: Row("code tables", tests="test_handover.py::test_foreign_quantization_states_are_refused", absent="tables are constants of the format"),
    46: Row("blocksizes", "*blocksize-*"),
    47: Row("absmax NaN, infinite, negative, -0", "*-absmax-nan *-absmax-infinite *-absmax-negative *-absmax-minus-zero *-first-* data-scale-* entropy-absmax sparse-step-* lowrank-step-*", "test_reference.py::test_both_decode_any_payload_to_the_same_bits_or_refuse_it"),
    48: Row("nested state", "data-nested-* data-offset-* *-double_quant-* nf4-double-absmax-* fp4-double-absmax-*"),
    49: Row("an unused half that is not 0", "data-unused-half *-unused-half zstd-inside"),
    50: Row("dtype as text, integer and complex targets", "item-dtype-text dtype-is-* *-of-int64 *-of-complex64"),
    51: Row("codec stages repeated, unknown, in another order", "stages-* stage-* item-codec-* planes-of-integers planes-parameter entropy-parameter entropy-alone sparse-k-* sparse-bits-* sparse-dct-* sparse-rows-* sparse-chunk sparse-cols-* sparse-width-* sparse-scaled-* sparse-parameters sparse-of-float64 lowrank-rank-* lowrank-width-*"),
    52: Row("a half-size payload of what is no float32", "fp16-of-* bf16-of-* item-codec-fp16-of-float64 item-codec-bf16-of-float16"),
    53: Row("zero block, single element, last block of 1", tests="kernels/test_definition.py::test_encode kernels/test_equality.py::test_every_small_length"),
    54: Row("sparse and delta payloads", "patch-* sparse-number sparse-position* sparse-bit-* sparse-*nothing* sparse-scales-cut sparse-rice-* sparse-inside-zstd lowrank-bit-behind lowrank-bomb", "test_reference.py::test_both_read_sparse_and_low_rank_alike_or_refuse_them test_compressors.py::test_unexpected_sparse_tensors_cannot_expand_to_gigabytes kernels/test_change_kernels.py::test_damaged_codes_get_the_same_verdict test_patch.py::test_damaged_patches_are_refused_before_a_byte_is_written"),
    # Integrity and identity
    55: Row("every substitution of a byte", tests=f"{MUTATIONS}test_every_substituted_byte_is_refused"),
    56: Row("swaps, bursts, lost sectors", tests=f"{MUTATIONS}test_every_swap_of_adjacent_bytes_is_refused {MUTATIONS}test_bursts_and_lost_sectors_are_refused"),
    57: Row("frames of another stream", "link", f"{MUTATIONS}test_frames_of_another_stream_with_the_same_schema_are_refused"),
    58: Row("frames replayed, dropped, reordered", "end-digest", f"{MUTATIONS}test_frames_lost_repeated_or_swapped_are_out_of_sequence"),
    59: Row("checksums mended by an attacker", tests=f"{MUTATIONS}test_both_readers_agree_on_mutants_whose_checksums_hold", absent="checksums are not authenticity: docs/security.md says so"),
    60: Row("tags of another key", absent="the format has no tags; see docs/security.md, Authenticity at rest"),
    61: Row("signatures", absent="the format has no signatures; see docs/security.md, Authenticity at rest"),
}  # fmt: skip
