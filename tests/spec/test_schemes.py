from __future__ import annotations

import pytest

from aqlm_cli.errors import UsageError
from aqlm_cli.spec.schemes import AdditiveScheme, UniformScheme, parse_scheme, scheme_for_bits, total_bytes


@pytest.mark.parametrize(
    "text",
    [
        "2x8g8",
        "1x12g8",
        "1x16g8",
        "8x1g64",
        "2x8g8c8",
        "int2g64",
        "int8g128",
        "3x8g8+int4g64r512",
        "3x8g8c8+int4g64r512",
        "int3g32+int4g16r7",
        "nf4g64",
        "nf3tg32",
        "cube4",
        "nf2t",
        "bfp6g16",
        "bmf6e2g16",
        "bl5g16",
    ],
)
def test_a_scheme_prints_as_it_was_read(text: str) -> None:
    assert str(parse_scheme(text)) == text


def test_additive_bits_count_codes_codebooks_and_scales() -> None:
    scheme = AdditiveScheme(num_codebooks=3, codebook_bits=5, group_size=4)
    out_features, in_features = 48, 64
    codes = 48 * 16 * 3 * 5
    codebooks = 3 * 32 * 4 * 16
    scales = 48 * 16
    assert scheme.stored_bits(out_features, in_features) == codes + codebooks + scales
    assert scheme.bits_per_weight(out_features, in_features) == pytest.approx(
        3 * 5 / 4 + 16 * 3 * 2**5 * 4 / (48 * 64) + 16 / 64
    )
    assert scheme.code_bits == 3.75


def test_codebooks_in_8_bits_count_half_and_a_range_for_each_place() -> None:
    scheme, sixteen = parse_scheme("3x5g4c8"), parse_scheme("3x5g4")
    saved = 3 * 32 * 4 * 8 - 3 * 4 * 16
    assert sixteen.stored_bits(48, 64) - scheme.stored_bits(48, 64) == saved
    assert scheme.bits_per_weight(48, 64) == pytest.approx(3 * 5 / 4 + (8 * 2**5 + 16) * 3 * 4 / (48 * 64) + 16 / 64)
    assert scheme.code_bits == sixteen.code_bits
    assert 8 * total_bytes(scheme.native_layouts(48, 64)) == scheme.stored_bits(48, 64)
    assert scheme.packed_layouts(48, 64) == sixteen.packed_layouts(48, 64)
    assert scheme != sixteen and scheme.codebook_shape == sixteen.codebook_shape


def test_codebooks_in_8_bits_save_a_ninth_of_a_small_matrix() -> None:
    sizes = [parse_scheme(word).stored_bits(192, 576) // 8 for word in ("2x8g8", "2x8g8c8")]
    assert sizes == [192 * 144 + 2 * 2048 * 2 + 384, 192 * 144 + 2 * 2048 + 2 * 8 * 2 + 384] == [36224, 32160]


def test_uniform_bits_count_a_scale_and_a_zero_point_a_group() -> None:
    scheme = UniformScheme(bits=2, group_size=64)
    assert scheme.stored_bits(10, 128) == 10 * 128 * 2 + 10 * 2 * (16 + 2)
    assert scheme.bits_per_weight(10, 128) == pytest.approx(2 + 18 / 64)


@pytest.mark.parametrize(
    ("bits", "text"), [(1, "1x8g8"), (1.5, "3x8g16"), (2, "2x8g8"), (2.5, "5x8g16"), (3, "3x8g8"), (4, "4x8g8")]
)
def test_bits_mean_exactly_that_many_code_bits(bits: float, text: str) -> None:
    assert str(scheme_for_bits(bits)) == text
    assert scheme_for_bits(bits).code_bits == bits


@pytest.mark.parametrize(
    ("bits", "neighbours"), [(0.5, ["1 (1x8g8)"]), (1.7, ["1.5 (3x8g16)", "2 (2x8g8)"]), (8, ["4 (4x8g8)"])]
)
def test_other_bits_are_refused_with_their_neighbours(bits: float, neighbours: list[str]) -> None:
    with pytest.raises(UsageError, match="--scheme") as error:
        scheme_for_bits(bits)
    assert all(neighbour in str(error.value) for neighbour in neighbours)


@pytest.mark.parametrize(
    "text", ["", "2x8", "2x8g8 ", "x8g8", "int2", "2x8g8g8", "-1x8g8", "INT2g64", "2²x8g8", "2x8g8c4", "2x8g8c16"]
)
def test_a_word_that_is_no_scheme_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="2x8g8"):
        parse_scheme(text)


@pytest.mark.parametrize(
    "text", ["0x8g8", "9x8g8", "2x0g8", "2x17g8", "2x8g0", "2x8g65", "int1g64", "int9g64", "int2g0"]
)
def test_a_scheme_out_of_range_says_what_is_allowed(text: str) -> None:
    with pytest.raises(UsageError, match=rf"{text}.*choose \d+ to \d+"):
        parse_scheme(text)


@pytest.mark.parametrize("text", ["2x8g16", "int2g16"])
def test_a_matrix_whose_groups_do_not_fit_is_refused_with_its_reason(text: str) -> None:
    scheme = parse_scheme(text)
    assert scheme.refuses(5, 48) is None
    reason = scheme.refuses(5, 40)
    assert reason is not None and "40" in reason and "16" in reason


def test_a_refined_scheme_counts_its_base_its_patch_and_the_index() -> None:
    scheme = parse_scheme("3x8g8+int4g64r512")
    base, patch = AdditiveScheme(3, 8, 8), UniformScheme(4, 64)
    assert scheme.stored_bits(4096, 576) == base.stored_bits(4096, 576) + patch.stored_bits(512, 576) + 32 * 512
    assert scheme.refuses(4096, 576) is None
    assert "fewer than the 512 rows" in (scheme.refuses(100, 576) or "")
    assert "group size 64" in (scheme.refuses(4096, 72) or "")
