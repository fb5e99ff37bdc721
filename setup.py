"""Build of the Cython extensions and of protos/; everything declarative is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

EXT = Path("mer/_ext")
CSRC = EXT / "csrc"
PROTOS = Path("protos")


def pkg_config(package: str, *flags: str) -> list[str]:
    """Ask pkg-config for `package`; stop with advice a person can act on when it is missing."""
    tool = shutil.which("pkg-config")
    if tool is None:
        sys.exit(f"mer: pkg-config is needed to find {package}: apt-get install pkg-config")
    found = subprocess.run([tool, *flags, package], capture_output=True, text=True)
    if found.returncode:
        sys.exit(
            f"mer: the C library {package} (2.3 or later) was not found.\n"
            f"  Debian, Ubuntu: apt-get install {package}-dev\n  Fedora: dnf install {package}-devel\n"
            f"  pkg-config said: {found.stderr.strip()}"
        )
    return found.stdout.split()


def extensions() -> list[Extension]:
    """One Extension per .pyx; a `csrc/<module>/*.c` folder belongs to the module of that name."""
    uring_cflags = pkg_config("liburing", "--cflags")
    uring_libs = pkg_config("liburing", "--libs")
    cflags = ["-O3", "-g1", "-std=gnu11", "-pthread", "-Wall", "-Wextra", "-fno-math-errno"]
    # A product is fused with a sum only where the code says so: results must not hang on inlining.
    cflags += ["-ffp-contract=off"]
    # What Cython's own generated C warns about is not ours to mend.
    cflags += ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-sign-compare"]
    cflags += os.environ.get("MER_CFLAGS", "").split()
    ldflags = ["-pthread", *os.environ.get("MER_LDFLAGS", "").split()]
    found = []
    for pyx in sorted(EXT.glob("*.pyx")):
        name = pyx.stem
        sources = [str(pyx), *sorted(str(c) for c in (CSRC / name).glob("*.c"))]
        headers = [
            str(h)
            for h in [*CSRC.glob("**/*.h"), *EXT.glob("*.px[di]"), *Path("mer/gpu").glob("kernels/*.cuh")]
        ]
        uses_uring = name == "uring"
        found.append(
            Extension(
                f"mer._ext.{name}",
                sources,
                depends=headers,
                include_dirs=[str(CSRC), numpy.get_include()],
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
                extra_compile_args=cflags + (uring_cflags if uses_uring else []),
                extra_link_args=ldflags + (uring_libs if uses_uring else []),
            )
        )
    return found


def generate() -> None:
    """Python of the .proto files, beside their package's __init__.py, with types; only what has changed."""
    for proto in sorted(PROTOS.glob("**/*.proto")):
        stem = proto.relative_to(PROTOS).with_suffix("")
        made = [Path(f"{stem}_pb2{end}") for end in (".py", ".pyi", "_grpc.py", "_grpc.pyi")]
        newest = max(proto.stat().st_mtime, Path(__file__).stat().st_mtime)
        if all(file.exists() and file.stat().st_mtime >= newest for file in made):
            continue
        # The plugins stand beside this Python, or where an isolated build has put them.
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        outputs = [f"--{kind}_out=." for kind in ("python", "grpc_python")]
        for name in ("mypy", "mypy_grpc"):
            plugin = shutil.which(f"protoc-gen-{name}", path=search)
            if plugin is None:
                sys.exit(f"mer: protoc-gen-{name} was not found: pip install mypy-protobuf")
            outputs += [f"--plugin=protoc-gen-{name}={plugin}", f"--{name}_out=quiet:."]
        print(f"generating {made[0]}")
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, str(proto)]
        if subprocess.run(command).returncode:
            sys.exit(f"mer: {proto} could not be compiled")


generate()
setup(
    options={"build_ext": {"parallel": len(os.sched_getaffinity(0))}},
    ext_modules=cythonize(
        extensions(),
        nthreads=0,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
    ),
)
