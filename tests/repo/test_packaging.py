"""The .deb: its sources agree with the rest of the tree, and a built one holds what it should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

import llmux

TREE = Path(__file__).resolve().parents[2]
PACKAGING = TREE / "packaging"
DEBIAN = PACKAGING / "debian"
VENDORED = {"sanic", "sanic-routing", "html5tagger", "tracerite"}


def test_every_vendored_wheel_is_pinned_by_hash() -> None:
    lines = [
        line
        for line in (PACKAGING / "requirements-vendored.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = [re.fullmatch(r"([a-z0-9-]+)==[0-9.]+ --hash=sha256:[0-9a-f]{64}", ln) for ln in lines]
    assert {pin[1] for pin in pins if pin} == VENDORED
    assert len(lines) == len(VENDORED)


def dependencies() -> set[str]:
    text = (DEBIAN / "control").read_text()
    match = re.search(r"^Depends:(.*?)^(?=\S)", text, re.M | re.S)
    assert match
    return {entry.split()[0] for entry in match[1].split(",") if entry.strip()}


def test_package_depends_on_all_that_the_project_and_sanic_need() -> None:
    names = {"pyyaml": "python3-yaml"}
    pyproject = (TREE / "pyproject.toml").read_text()
    declared = re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.M | re.S)
    assert declared
    project = set(re.findall(r'"([a-z0-9-]+)', declared[1])) - VENDORED
    # What Sanic's metadata lists, but for setuptools, which nothing in it imports.
    sanic = {
        "aiofiles", "httptools", "multidict", "typing-extensions", "ujson", "uvloop", "websockets",
    }  # fmt: skip
    wanted = {names.get(name, f"python3-{name}") for name in project | sanic}
    assert wanted <= dependencies()


def test_changelog_is_of_this_version() -> None:
    top = (DEBIAN / "changelog").read_text().splitlines()[0]
    assert top.startswith(f"llmux ({llmux.__version__}) ")


def test_licences_of_all_vendored_code_are_stated() -> None:
    text = (DEBIAN / "copyright").read_text()
    for name in VENDORED:
        assert f"Files: usr/lib/llmux/{name.replace('-', '_')}/*" in text


@pytest.mark.parametrize(
    "script", ["packaging/debian/postinst", "packaging/debian/prerm", "packaging/debian/postrm",
               "packaging/completions/llmux", "scripts/manual",
               "scripts/build-deb", "scripts/demo", "scripts/test", "scripts/_env.sh", ".ci/run"],
)  # fmt: skip
def test_shell_scripts_pass_shellcheck(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "-x", script],
        cwd=TREE,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout


# --- a built package ---

needs_package = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def package() -> Path:
    """The package of this very tree, which scripts/build-deb has in its cache or builds now."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    if os.geteuid() != 0 and shutil.which("dh") is None:
        pytest.skip("debhelper is not installed")
    done = subprocess.run(
        [TREE / "scripts/build-deb"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def members(package: Path) -> dict[str, tarfile.TarInfo]:
    data = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", package], capture_output=True, timeout=60, check=True
    ).stdout
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        return {member.name.removeprefix("."): member for member in archive.getmembers()}


def control_file(package: Path, name: str) -> str:
    return subprocess.run(
        ["dpkg-deb", "--info", package, name],
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip


class TestBuiltPackage:
    pytestmark = needs_package

    def test_has_the_program_the_units_and_the_vendored_code(
        self, members: dict[str, tarfile.TarInfo]
    ) -> None:
        for path in (
            "/usr/bin/llmux",
            "/usr/lib/llmux/llmux/cli/main.py",
            "/usr/lib/llmux/sanic/app.py",
            "/usr/lib/llmux/sanic_routing/__init__.py",
            "/usr/lib/llmux/html5tagger/__init__.py",
            "/usr/lib/llmux/html5tagger-2.0.0.dist-info/METADATA",
            "/usr/lib/llmux/tracerite/__init__.py",
            "/usr/lib/systemd/system/llmux.service",
            "/usr/lib/systemd/system/llmux-gateway.service",
            "/usr/lib/systemd/system/llmux.slice",
            "/usr/lib/systemd/system/llmux-engines.target",
            "/usr/lib/sysusers.d/llmux.conf",
            "/usr/lib/tmpfiles.d/llmux.conf",
            "/etc/llmux/config.yaml",
            "/etc/llmux/conf.d/",
            "/etc/needrestart/conf.d/llmux.conf",
        ):
            assert path.rstrip("/") in members
        assert not any(name.startswith("/lib") for name in members)

    def test_holds_all_of_llmux(self, members: dict[str, tarfile.TarInfo]) -> None:
        sources = {
            f"/usr/lib/llmux/{path.relative_to(TREE)}" for path in (TREE / "llmux").rglob("*.py")
        }
        assert sources <= set(members)

    def test_has_nothing_compiled_and_nothing_that_pip_leaves(
        self, members: dict[str, tarfile.TarInfo]
    ) -> None:
        assert not [
            name
            for name in members
            if name.endswith((".pyc", ".so", "__pycache__", "/RECORD", "/INSTALLER"))
        ]

    def test_program_heeds_no_python_variable_and_no_home(self, package: Path) -> None:
        # dh_python3 rewrites shebangs, in Debian 13 without their options. This one runs as root.
        content = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", package], capture_output=True, timeout=60, check=True
        ).stdout
        with tarfile.open(fileobj=BytesIO(content)) as archive:
            program = archive.extractfile("./usr/bin/llmux")
            assert program
            assert program.readline() == b"#!/usr/bin/python3 -I\n"

    def test_configuration_may_hold_secrets(self, members: dict[str, tarfile.TarInfo]) -> None:
        assert members["/etc/llmux/config.yaml"].mode & 0o007 == 0

    def test_everything_belongs_to_root_and_is_of_one_moment(
        self, members: dict[str, tarfile.TarInfo]
    ) -> None:
        assert {(member.uid, member.gid) for member in members.values()} == {(0, 0)}
        stamps = {member.mtime for member in members.values()}
        assert len(stamps) == 1, "a build at another time would differ"

    def test_upgrade_restarts_the_services_and_never_the_slice(self, package: Path) -> None:
        (restart,) = [
            line
            for line in control_file(package, "postinst").splitlines()
            if "deb-systemd-invoke" in line
        ]
        assert "try-restart llmux-gateway.service llmux.service " in restart
        # Everything in the slice requires it: restarted with them it would end every engine.
        assert "slice" not in restart

    def test_users_are_made_before_anything_needs_them(self, package: Path) -> None:
        postinst = control_file(package, "postinst")
        steps = ["systemd-sysusers", "systemd-tmpfiles", "chown root:llmux"]
        assert sorted(steps, key=postinst.index) == steps

    def test_first_installation_starts_nothing(self, package: Path) -> None:
        postinst = control_file(package, "postinst")
        assert not re.search(r"deb-systemd-invoke (start|restart)", postinst)
        condition = next(line for line in postinst.splitlines() if '[ -n "$2" ]' in line)
        assert postinst.index(condition) < postinst.index("deb-systemd-invoke try-restart")

    def test_an_upgrade_checks_the_configuration_before_it_restarts(self, package: Path) -> None:
        steps = ["if problems=$(llmux check", "deb-systemd-invoke try-restart", "not restarted"]
        postinst = control_file(package, "postinst")
        assert sorted(steps, key=postinst.index) == steps

    def test_an_upgrade_stops_nothing(self, package: Path, tmp_path: Path) -> None:
        for name in ("deb-systemd-invoke", "systemctl", "py3clean"):
            (tmp_path / name).write_text(f'#!/bin/sh\necho "$0 $*" >>{tmp_path}/called\n')
            (tmp_path / name).chmod(0o755)
        script = tmp_path / "prerm"
        script.write_text(control_file(package, "prerm"))
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["sh", script, "upgrade", "9.9.9"], check=True, env=env)
        called = tmp_path / "called"
        assert not called.exists() or "systemctl" not in called.read_text()

    def test_documents_are_in_the_package(self, members: dict[str, tarfile.TarInfo]) -> None:
        names = {name.lstrip("/") for name in members}
        for name in (
            "usr/share/man/man1/llmux.1.gz", "usr/share/man/man8/llmux.8.gz",
            "usr/share/man/man5/llmux.yaml.5.gz", "usr/share/doc/llmux/changelog.gz",
            "usr/share/doc/llmux/examples/two-models.yaml",
            "usr/share/bash-completion/completions/llmux",
        ):  # fmt: skip
            assert name in names, name
        for unit in ("llmux.service", "llmux-gateway.service"):
            text = (TREE / "units" / unit).read_text(encoding="utf-8")
            documents = re.findall(r"file:///(\S+)", text)
            assert documents and set(documents) <= names, unit

    def test_a_repository_that_apt_trusts(self, package: Path, tmp_path: Path) -> None:
        """Two versions are in it; apt's state is in a directory of this test."""
        repository = tmp_path / "repository"
        for more in ([], ["--version", "9.9.9"]):
            subprocess.run(
                [TREE / "scripts/build-deb", "--repo", repository, *more],
                capture_output=True, timeout=280, check=True,
            )  # fmt: skip
        sources = tmp_path / "sources"
        sources.mkdir()
        (sources / "llmux.sources").write_text((repository / "llmux.sources").read_text())
        options = {
            "Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": sources,
            "Dir::Etc::trusted": "/dev/null", "Dir::Etc::trustedparts": tmp_path / "none",
            "Dir::State": tmp_path, "Dir::Cache": tmp_path, "APT::Sandbox::User": "root",
        }  # fmt: skip
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        (tmp_path / "lists/partial").mkdir(parents=True)

        def apt(*verb: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*verb, *words], capture_output=True, text=True, check=False)

        update = apt("apt-get", "update")
        assert update.returncode == 0 and "W:" not in update.stderr, update.stderr
        versions = apt("apt-cache", "madison", "llmux").stdout
        assert "9.9.9" in versions and llmux.__version__ in versions
        index = repository / "Packages"
        index.write_text(index.read_text().replace("Description: many", "Description: other"))
        (repository / "Packages.gz").unlink()
        (tmp_path / "lists").rename(tmp_path / "before")
        (tmp_path / "lists/partial").mkdir(parents=True)
        assert apt("apt-get", "update").returncode != 0, "what is not signed is not believed"

    def test_a_second_build_gives_the_same_bytes(self, package: Path, tmp_path: Path) -> None:
        """At another time, in another directory, under another umask and in another time zone."""
        for wheels in package.parents[1].glob("wheels-*"):
            (tmp_path / "deb").mkdir(exist_ok=True)
            (tmp_path / "deb" / wheels.name).symlink_to(wheels)
        command = f"umask 077; TZ=Asia/Tokyo LLMUX_CACHE={tmp_path} {TREE}/scripts/build-deb"
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, timeout=280, check=True
        )
        assert Path(done.stdout.splitlines()[-1]).read_bytes() == package.read_bytes()


@pytest.mark.parametrize("fails", ["ruff check", "ruff format", "mypy --cache-dir", ""])
def test_what_the_linters_find_is_a_failure_also_where_the_tests_go_on(fails: str) -> None:
    text = (TREE / "scripts/test").read_text()
    lint = text[text.index("lint() {") :].partition("\n}\n")[0]
    program = f"""
        say() {{ :; }}
        ruff() {{ [ "ruff $1" != "$FAILS" ]; }}
        mypy() {{ [ "mypy $1 $3" != "$FAILS -p" ]; }}
        cache=x
        set -e
        {lint}
        }}
        status=0
        lint || status=1
        exit $status
    """
    environment = {**os.environ, "FAILS": fails}
    done = subprocess.run(["bash", "-c", program], cwd=TREE, env=environment, check=False)
    assert done.returncode == bool(fails)
