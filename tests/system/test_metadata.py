"""What the project says of itself in several places is the same in all."""

import re
import tomllib

import yaml

from clipfilter_wds import __version__
from tests.support.pages import ROOT, cells_of, section_of

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_citation_and_changelog_are_of_this_version():
    released = re.search(r"^## \[(\d\S+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released.groups() == (citation["version"], str(citation["date-released"]))
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]


def test_badges_say_what_the_package_requires():
    badges = dict(re.findall(r"badge/([a-z]+)-(\S+)-blue\)", README))
    [torch] = [requirement for requirement in PROJECT["dependencies"] if requirement.startswith("torch>")]
    assert badges["python"] == PROJECT["requires-python"].replace(">=", "%E2%89%A5%20")
    assert badges["pytorch"] == torch.removeprefix("torch").replace(">=", "%E2%89%A5%20")
    assert badges["license"].replace("--", "-") == PROJECT["license"]


def test_readme_lists_every_extra():
    told = {name for first, *_ in cells_of(section_of(README, "Install")) for name in re.findall(r"`([\w-]+)`", first)}
    assert told == set(PROJECT["optional-dependencies"])


def test_every_pip_finds_every_extra():
    """Older ones compare with the normal form (PEP 685), in which wheels have them, and install nothing otherwise."""
    for extra in PROJECT["optional-dependencies"]:
        assert extra == re.sub(r"[-_.]+", "-", extra).lower()
