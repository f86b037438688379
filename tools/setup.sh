#!/usr/bin/env bash
# Make .venv from requirements.lock. Done once: a stamp named by the hash of everything that decides the outcome
# (__init__.py has the version) makes the next call return at once. ffcv and DALI are optional:
# a failure there is reported and the rest goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
SYSTEM_PACKAGES="pkg-config libopencv-dev libturbojpeg0-dev"  # what building ffcv needs, by its Debian names
BROWSER_PACKAGES="chromium chromium-driver"

say() { printf 'setup: %s\n' "$*" >&2; }

version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    say "$PYTHON does not start; install Python 3.11 or newer, or say: make PYTHON=/path/to/python3"
    exit 2
}
case $version in 2.* | 3.? | 3.10)
    say "$PYTHON is Python $version; fastcifar needs 3.11 or newer: make PYTHON=/path/to/python3"
    exit 2
esac

key=$({ echo "$version"; cat requirements.lock pyproject.toml fastcifar/__init__.py tools/setup.sh; } | cksum | tr ' ' '-')
stamp=.venv/.ready-$key
[ -e "$stamp" ] && exit 0

# uv installs in half a minute what pip needs several for; where it is not on PATH it comes into .venv itself.
make_venv() {
    if [ -x .venv/bin/python ] && [ "$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$version" ]; then
        say "bringing .venv (Python $version) up to date"
    elif command -v uv >/dev/null; then
        say "making .venv with Python $version"
        uv venv --quiet --clear --python "$(command -v "$PYTHON")" .venv
    else
        say "making .venv with Python $version, and uv in it"
        "$PYTHON" -m venv --clear .venv
    fi
    UV=$(command -v uv || true)
    [ -n "$UV" ] || UV=.venv/bin/uv
    # An environment that uv has made has no pip.
    [ -x "$UV" ] || .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    [ -x "$UV" ] || .venv/bin/python -m pip install --quiet "$(grep '^uv==' requirements.lock)"
}

install() { "$UV" pip install --quiet --python .venv/bin/python "$@"; }

have_system_packages() { pkg-config --exists opencv4 libturbojpeg 2>/dev/null; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

get_system_packages() {
    have_system_packages && return 0
    command -v apt-get >/dev/null && as_root true 2>/dev/null || return 1
    say "installing $SYSTEM_PACKAGES with apt-get (for ffcv)"
    as_root apt-get -qq update >&2
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends $SYSTEM_PACKAGES >/dev/null
    have_system_packages
}

install_ffcv() {
    if ! get_system_packages; then
        say "going on without ffcv: it needs pkg-config, OpenCV 4 and libjpeg-turbo with their headers. On Debian or"
        say "Ubuntu: sudo apt-get install $SYSTEM_PACKAGES -- elsewhere the packages that give pkg-config the modules"
        say "opencv4 and libturbojpeg. Then: rm .venv/.ready-* and make environment"
        return 0
    fi
    install --build-constraints requirements.lock "$(grep '^ffcv==' requirements.lock)" ||
        say "going on without ffcv: its build failed as shown above (it needs a C++ compiler: g++)"
}

install_dali() {
    local pin
    pin=$(grep '^nvidia-dali-cuda120==' requirements.lock)
    install "$pin" || say "going on without DALI: no wheel of it could be installed on this system"
}

# A browser for the tests of the pages. Unasked only where the machine is ours alone: as root, or in CI.
get_browser() {
    command -v chromedriver >/dev/null && return 0
    command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || [ -n "${CI:-}" ]; } || return 0
    say "installing $BROWSER_PACKAGES with apt-get (for the tests of the report)"
    # shellcheck disable=SC2086
    { as_root apt-get -qq update &&
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends $BROWSER_PACKAGES
    } >/dev/null 2>&1 || say "going on without a browser: the tests of the report's page in one are skipped"
}

make_venv
grep -v -e '^ffcv==' -e '^nvidia-dali-cuda120==' -e '^uv==' requirements.lock >.venv/requirements.txt
install --requirements .venv/requirements.txt
install --no-deps --no-build-isolation --editable .
install_ffcv
install_dali
get_browser
rm -f .venv/.ready-*
touch "$stamp"
say "ready: .venv"
