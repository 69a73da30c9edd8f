# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
# Sourced by scripts/test, scripts/demo and .ci/run from the root of the checkout: `prepare_environment` makes .venv
# with this checkout installed in it (editable), at the versions of constraints.txt, and puts it first on PATH.
# Nothing outside the checkout is changed. PYTHON says which Python to use; the default is python3.

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

# Exits with a message unless there are a Python and a C compiler to work with.
check_tools() {
    _python=${PYTHON:-python3}
    command -v "$_python" >/dev/null 2>&1 ||
        die "there is no $_python. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.11 $0"
    _version=$("$_python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        die "$_python does not run. Name another: PYTHON=/path/to/python3.11 $0"
    "$_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$_python is Python $_version; the versions in constraints.txt need 3.11 or newer. \
Name one: PYTHON=/path/to/python3.11 $0"
    "$_python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "Python $_version lacks venv or pip. On Debian and Ubuntu: apt-get install python3-venv"
    for _compiler in "${CXX:-${CC:-g++}}" gcc clang cc; do
        command -v "$_compiler" >/dev/null 2>&1 && return
    done
    die "there is no C compiler, which links the kernels. On Debian and Ubuntu: apt-get install gcc"
}

prepare_environment() {
    check_tools
    # Made anew when it is broken (a Python that was removed), installed again when what is asked for changed.
    .venv/bin/python -c 'import pip' >/dev/null 2>&1 || {
        echo "making .venv with Python $_version"
        rm -rf .venv
        "$_python" -m venv .venv
    }
    _wanted=$(cat pyproject.toml constraints.txt; pwd -P)
    if [ "$(cat .venv/installed-for 2>/dev/null)" != "$_wanted" ]; then
        echo "installing tvmdcn and what it needs into .venv (the first time takes minutes)"
        # The build backend first: without build isolation no second copy of anything is fetched for the build.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
            --no-build-isolation --editable '.[all]'
        printf '%s\n' "$_wanted" >.venv/installed-for
    fi
    PATH=$PWD/.venv/bin:$PATH
    export PATH
}
