"""What keeps the repository in order works: workflows, issue forms, citation, and the pages on
contributing.
"""

import re
from pathlib import Path

import pytest
import yaml

import owl2_hf

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
if not GITHUB.is_dir():
    pytest.skip("the repository's own files are not here", allow_module_level=True)
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(
    path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"
)


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def names(paths):
    return [path.name for path in paths]


@pytest.mark.parametrize("path", WORKFLOWS, ids=names(WORKFLOWS))
def test_actions_are_pinned_by_their_commit_and_name_their_version(path):
    used = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
    assert used
    for line in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_all_workflows_use_the_same_commit_of_an_action():
    lines = {line for path in WORKFLOWS for line in re.findall(r"uses: (\S+)", path.read_text())}
    actions = [line.partition("@")[0] for line in lines]
    assert len(actions) == len(set(actions))


@pytest.mark.parametrize("path", WORKFLOWS, ids=names(WORKFLOWS))
def test_workflows_may_read_and_jobs_ask_for_more(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False


def test_a_release_is_published_without_a_stored_password():
    text = read(".github/workflows/release.yml")
    assert "secrets." not in text and "password" not in text.partition("\non:")[2]
    publish = yaml.safe_load(text)["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"


def test_every_command_of_the_workflows_is_a_target_of_the_makefile():
    makefile = read("Makefile")
    pages = [*WORKFLOWS, ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", ROOT / ".ci" / "run"]
    found = {
        target
        for page in pages
        for target in re.findall(r"(?:run: |^|\$ |`)make ([\w-]+)", page.read_text(), re.MULTILINE)
    }
    assert found >= {"coverage", "mutations", "sbom", "wheel"}
    for target in found:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_ci_runs_on_every_python_that_is_promised_and_on_three_systems():
    matrix = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["everywhere"]["strategy"]
    pythons, systems = matrix["matrix"]["python"], matrix["matrix"]["os"]
    (oldest,) = re.findall(r'^requires-python = ">=(.*)"', read("pyproject.toml"), re.MULTILINE)
    assert pythons[0] == oldest and pythons[-1] == "3.14" and len(pythons) == 5
    assert [system.partition("-")[0] for system in systems] == ["ubuntu", "macos", "windows"]


def test_the_fast_half_names_tests_that_are_there():
    files = read("tests/fast_half.txt").split()
    assert len(files) > 10
    for file in files:
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("path", FORMS, ids=names(FORMS))
def test_an_issue_form_is_whole(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert ids and len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["attributes"].get("label") or part["attributes"].get("value")


def test_reports_of_wrong_results_ask_for_the_check():
    for name in ("bug", "numbers"):
        form = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))
        (check,) = [part for part in form["body"] if part.get("id") == "check"]
        assert "owl2-hf check --json" in check["attributes"]["label"]
        assert check["validations"]["required"] is True


def test_the_citation_names_this_version_and_the_authors_of_the_model():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == owl2_hf.__version__
    notice = " ".join(read("NOTICE").split())
    for author in citation["preferred-citation"]["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in notice


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "AGENTS.md"])
def test_files_and_links_of_the_pages_exist(page):
    text = read(page)
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`((?:tests|src|docs|\.github|\.ci)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_code_named_in_contributing_exists():
    text = read("CONTRIBUTING.md")
    sources = "\n".join(path.read_text() for path in (ROOT / "src" / "owl2_hf").rglob("*.py"))
    sources += "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    known = set(re.findall(r"\w+", sources))
    for section in ("Add a connector", "Add a scoring preset", "Add a checkpoint layout"):
        part = text.partition(f"## {section}\n")[2].partition("\n## ")[0]
        found = re.findall(r"`([A-Za-z_]\w+(?:\.\w+)?)`", part)
        assert len(found) >= 3, section
        for name in found:
            assert name.endswith(".py") or set(name.split(".")) <= known | {"json"}, name


def test_the_example_of_a_deprecation_runs():
    text = read("CONTRIBUTING.md").partition("## Deprecate a name")[2]
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {"new_name": lambda: "new"}
    exec(compile(example, "CONTRIBUTING.md", "exec"), names)
    with pytest.warns(FutureWarning, match=r"use new_name\(\)"):
        assert names["old_name"]() == "new"
