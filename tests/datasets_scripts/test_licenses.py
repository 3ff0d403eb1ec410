"""Licenses in the spellings that models come with, and whether weights under them may be passed on."""

import pytest

from datasets_scripts.licenses import (
    ALIASES,
    KNOWN,
    REDISTRIBUTABLE,
    WITHHOLDING,
    is_redistributable,
    license_ids,
    refusal_reason,
    withheld_models,
)


@pytest.mark.parametrize(
    ("stated", "identifier"),
    [
        ("apache-2.0", "apache-2.0"),
        ("Apache License 2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("MIT License", "mit"),
        ("The MIT License (MIT)", "mit"),
        ("BSD-3-Clause", "bsd-3-clause"),
        ('BSD 3-Clause "New" or "Revised" License', "bsd-3-clause"),
        ("GPL-3.0-or-later", "gpl-3.0"),
        ("GNU General Public License v3.0", "gpl-3.0"),
        ("GNU Affero General Public License v3.0", "agpl-3.0"),
        ("Mozilla Public License 2.0", "mpl-2.0"),
        ("CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0"),
        ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International", "cc-by-nc-sa-4.0"),
        ("Creative Commons Zero v1.0 Universal", "cc0-1.0"),
        ("CC0", "cc0-1.0"),
        ("Llama 3.1 Community License Agreement", "llama3.1"),
        ("gemma", "gemma"),
        ("openrail++", "openrail++"),
        ("NOASSERTION", "unknown"),
        ("License", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
        ("other", "other"),
        ("dinov3-license", "other"),
    ],
)
def test_every_usual_spelling_is_read_as_the_hub_s_identifier(stated, identifier):
    assert license_ids(stated) == (identifier,)


def test_every_identifier_is_read_as_itself_and_every_alias_names_one():
    for identifier in KNOWN:
        assert license_ids(identifier) == license_ids(identifier.upper()) == (identifier,)
    assert set(ALIASES.values()) <= KNOWN
    assert not REDISTRIBUTABLE & WITHHOLDING
    assert all(is_redistributable(identifier) == (identifier in REDISTRIBUTABLE) for identifier in KNOWN)


@pytest.mark.parametrize(
    "stated", ["mit", "apache-2.0", "cc-by-4.0", "gpl-3.0", "cc-by-nc-4.0", "openrail", "cc0-1.0"]
)
def test_licenses_that_let_others_share_adapted_copies_are_redistributable(stated):
    assert is_redistributable(stated)


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ("cc-by-nd-4.0", "cc-by-nd-4.0 does not let others share adapted copies"),
        ("cc-by-nc-nd-4.0", "does not let others share adapted copies"),
        ("llama3", "does not let others share adapted copies"),
        ("Llama 3 Community License", "does not let others share adapted copies"),
        ("gemma", "does not let others share adapted copies"),
        ("apple-amlr", "does not let others share adapted copies"),
        ("cc", "not among those that are known"),
        ("nvidia-open-model-license", "nvidia-open-model-license is not among those"),
        ("MIT (README badge, no license file)", "not among those"),
        ("MIT for code, weights for research only", "not among those"),
        ("Apache-2.0 (non-commercial only)", "not among those"),
        ("other", "not among those"),
        (None, "no license is stated"),
    ],
)
def test_whatever_forbids_it_or_is_not_known_keeps_the_weights_back_with_the_reason(stated, reason):
    assert is_redistributable(stated) is False
    assert reason in refusal_reason(stated)


def test_of_several_licenses_of_one_model_each_has_to_let_the_weights_go():
    assert license_ids("mit, cc-by-nc-4.0") == ("mit", "cc-by-nc-4.0") and is_redistributable("mit, cc-by-nc-4.0")
    assert license_ids("MIT, mit") == ("mit",)
    assert not is_redistributable("mit, cc-by-nd-4.0")
    assert license_ids("mit, my-own") == ("mit", "other") and not is_redistributable("mit, my-own")
    assert "license mit, my-own is not among" in refusal_reason("mit, my-own")


def test_bit_identical_copies_are_withheld_with_what_they_copy_unless_its_license_is_merely_unknown():
    def row(name, license, sha256):
        return {"model_id": name, "license": license, "weights_sha256": sha256}

    rows = [row("copy", "MIT", "1"), row("original", "llama3", "1"), row("free", "mit", "2"), row("mute", None, "3")]
    withheld = withheld_models([*rows, row("said", "mit", "3")])
    assert list(withheld) == ["copy", "original", "mute"]
    assert withheld["copy"].startswith("has the weights of original, bit for bit, whose license llama3 does not let")
    assert "no license is stated" in withheld["mute"]
