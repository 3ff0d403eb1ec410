"""Licenses in the spellings that models come with: what they allow, and which of several is the strictest."""

import pytest

from datasets_scripts.licenses import ALIASES, MAY_BECOME, TABLE, license_of, redistributable, strictest


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
def test_every_usual_spelling_finds_its_row_of_the_table(stated, identifier):
    assert license_of(stated).identifier == identifier


def test_every_row_and_every_alias_is_found_by_itself_and_names_a_row():
    for identifier in TABLE:
        assert license_of(identifier).identifier == identifier
        assert license_of(identifier.upper()).identifier == identifier
    assert set(ALIASES.values()) <= set(TABLE)
    assert {license for pair in MAY_BECOME for license in pair} <= set(TABLE)


@pytest.mark.parametrize(
    "stated", ["mit", "apache-2.0", "cc-by-4.0", "gpl-3.0", "cc-by-nc-4.0", "openrail", "cc0-1.0"]
)
def test_licenses_that_let_others_share_adapted_copies_say_on_which_conditions(stated):
    verdict = redistributable(stated)
    assert verdict
    assert stated in verdict.reason


@pytest.mark.parametrize(
    ("stated", "reason"),
    [
        ("cc-by-nd-4.0", "forbids sharing adapted copies"),
        ("cc-by-nc-nd-4.0", "forbids sharing adapted copies"),
        ("llama3", "terms of its own"),
        ("gemma", "terms of its own"),
        ("apple-amlr", "terms of its own"),
        ("cc", "not among those whose terms are known"),
        ("nvidia-open-model-license", "nvidia-open-model-license is not among those"),
        ("MIT (README badge, no license file)", "not among those"),
        ("MIT for code, weights for research only", "not among those"),
        ("Apache-2.0 (non-commercial only)", "not among those"),
        ("other", "not among those"),
        (None, "no license is stated"),
    ],
)
def test_whatever_forbids_it_or_is_not_known_keeps_the_weights_back_with_the_reason(stated, reason):
    verdict = redistributable(stated)
    assert not verdict
    assert reason in verdict.reason


def test_of_several_licenses_of_one_model_the_strictest_counts_and_an_unknown_one_makes_all_unknown():
    assert license_of("mit, cc-by-nc-4.0").identifier == "cc-by-nc-4.0"
    assert license_of("cc-by-nc-4.0, mit").identifier == "cc-by-nc-4.0"
    found = license_of("mit, my-own")
    assert (found.identifier, found.stated) == ("other", "mit, my-own")


def test_the_order_of_strictness_is_that_of_what_is_asked_for():
    order = ["cc0-1.0", "mit", "mpl-2.0", "gpl-3.0", "openrail", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "llama3"]
    order += ["cc-by-nd-4.0", "cc-by-nc-nd-4.0", "other", "unknown"]
    ranks = [license_of(identifier).rank for identifier in order]
    assert ranks == sorted(ranks)
    for count in range(1, len(order) + 1):
        assert strictest(reversed(order[:count])).license.identifier == order[count - 1]


def test_licenses_that_no_license_of_the_whole_satisfies_are_said():
    (conflict,) = strictest(["MIT", "GPL-3.0", "CC BY-NC 4.0"]).conflicts
    assert "gpl-3.0 forbids further restrictions" in conflict
    assert "cc-by-nc-4.0 adds some (no commercial use)" in conflict
    (conflict,) = strictest(["gpl-2.0", "cc-by-sa-4.0"]).conflicts
    assert "each want the whole under themselves" in conflict
    assert len(strictest(["gpl-3.0", "openrail", "cc-by-nc-sa-4.0"]).conflicts) == 3


def test_licenses_that_may_become_one_another_are_no_conflict():
    for licenses in (["mit", "apache-2.0", "gpl-3.0"], ["cc-by-sa-4.0", "gpl-3.0"], ["mit", None], ["mit", "MIT"]):
        assert strictest(licenses).conflicts == ()
    assert strictest(["mit", None]).license.identifier == "unknown"
    with pytest.raises(ValueError, match="No licenses were given"):
        strictest([])
