#!/usr/bin/env bash
# Writes the hashes that the container's packages are pinned by; needs uv. Run it when pyproject.toml's dependencies change.
set -eu
cd "$(dirname "$0")/.."
compile() {
    uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_36 --only-binary :all: \
        --generate-hashes --no-emit-index-url --no-header --no-annotate "$@"
}
compile pyproject.toml --output-file deploy/docker/requirements.txt
python3 - <<'PY' | compile - --output-file deploy/docker/build-requirements.txt
import tomllib

requires = tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]
print(*requires, "pip", "wheel", "cyclonedx-bom", sep="\n")
PY
for extra in cuda cuda12; do # what the image has beside the above with --build-arg GPU=
    python3 - $extra <<'PY' | compile - --output-file deploy/docker/requirements-$extra.txt
import sys
import tomllib

print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
PY
done
