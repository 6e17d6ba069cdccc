"""Collect in gpu_bundle/ what a GPU machine without network lacks; run it by `make gpu-bundle`.

The machine brings Python 3.12, torch for CUDA, Triton, transformers and most of their friends. The
rest comes as wheels, in the versions of constraints.txt, with the commit they were collected at.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from gpu_ground import BUNDLE, COMMIT_NOTE, ROOT, commit
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

LIMIT_BYTES = 40_000_000

BUILT = ("deepspeed",)  # published as source only; its ops stay unbuilt, so the wheel is pure
DOWNLOADED = (
    "annotated-types",
    "hjson",
    "pydantic",
    "pydantic-core",
    "pytest-timeout",  # pyproject.toml sets its option, without which pytest would not begin
    "sentencex",
    "typing-extensions",  # the machine may have an older one than pydantic needs
    "typing-inspection",
    "xxhash",
)
ON_THE_MACHINE = {
    *("einops", "msgpack", "ninja", "numpy", "packaging", "psutil", "py-cpuinfo", "torch", "tqdm"),
}
TARGET = ["--python-version=3.12", "--implementation=cp", "--only-binary=:all:"] + [
    f"--platform={platform}"
    for platform in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
]


def main() -> None:
    pins = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    wheels = collect(BUNDLE, {name: pins[name] for name in (*BUILT, *DOWNLOADED)})
    check_size(wheels)
    with tempfile.TemporaryDirectory() as target:
        _pip("install", "--no-index", "--no-deps", "--target", target, *TARGET, *wheels)
        check_requirements(distributions(path=[target]))
    COMMIT_NOTE.write_text(commit() + "\n", encoding="utf-8")
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{BUNDLE}: {len(wheels)} wheels, {size / 1e6:.1f} MB, commit {commit()}")


def read_pins(constraints: str) -> dict[str, str]:
    """Name to version, of the lines `name==version`."""
    found = re.findall(r"^([\w.-]+)==([\w.+!-]+)\s*$", constraints, flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def collect(bundle: Path, wanted: dict[str, str]) -> list[Path]:
    """One wheel for each wanted package; those that are there are kept, others removed."""
    bundle.mkdir(exist_ok=True)
    for wheel in bundle.glob("*.whl"):
        wheel_name, wheel_version, *_ = parse_wheel_filename(wheel.name)
        if wanted.get(wheel_name) != str(wheel_version):
            wheel.unlink()
    there = {parse_wheel_filename(wheel.name)[0] for wheel in bundle.glob("*.whl")}
    for name, version in wanted.items():
        if name in there:
            continue
        if name in BUILT:
            _pip(
                "wheel", "--no-deps", "--wheel-dir", bundle, f"{name}=={version}", DS_BUILD_OPS="0"
            )
        else:
            _pip("download", "--no-deps", "--dest", bundle, *TARGET, f"{name}=={version}")
    wheels = sorted(bundle.glob("*.whl"))
    for wheel in wheels:
        if parse_wheel_filename(wheel.name)[0] in BUILT and "py3-none-any" not in wheel.name:
            sys.exit(f"gpu-bundle: {wheel.name} holds compiled code; unset the DS_BUILD variables")
    assert len(wheels) == len(wanted)
    return wheels


def check_size(wheels: Iterable[Path], limit_bytes: int = LIMIT_BYTES) -> None:
    size = sum(wheel.stat().st_size for wheel in wheels)
    if size > limit_bytes:
        sys.exit(
            f"gpu-bundle: the wheels have {size / 1e6:.1f} MB, and {limit_bytes / 1e6:.0f} MB may "
            f"travel; leave out what the GPU machine already has"
        )


def check_requirements(installed: Iterable[Distribution]) -> None:
    """Everything a wheel needs is in the bundle in a fitting version, or on the machine."""
    found = {canonicalize_name(wheel.name): wheel for wheel in installed}
    for name, wheel in found.items():
        for requirement in map(Requirement, wheel.requires or ()):
            if requirement.marker and not requirement.marker.evaluate({"python_version": "3.12"}):
                continue
            needed = canonicalize_name(requirement.name)
            other = found.get(needed)
            if other is None and needed not in ON_THE_MACHINE:
                sys.exit(f"gpu-bundle: {name} needs {requirement}, which nothing provides there")
            if other is not None and not requirement.specifier.contains(other.version):
                sys.exit(f"gpu-bundle: {name} needs {requirement}, but {other.version} is bundled")


def _pip(*arguments: object, **environment: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", str(arguments[0]), *quiet, *map(str, arguments[1:])]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"gpu-bundle: `{' '.join(command)}` failed:\n{done.stderr.strip()}")


if __name__ == "__main__":
    main()
