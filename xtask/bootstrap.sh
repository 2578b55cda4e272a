#!/bin/sh
# Runs `cargo xtask` with the given words on a machine that may have no Rust yet:
#     sh xtask/bootstrap.sh demo
# Installs a C compiler, rustup and the pinned toolchain where they are missing, and nothing else.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
export PATH

fail() {
    echo "bootstrap: $*" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

# The distribution's packages that are missing and that it has.
packages=
has cc || packages="gcc libc6-dev"
has rustup || packages="$packages rustup ca-certificates"
if [ -n "$packages" ]; then
    has apt-get || fail "install a C compiler and rustup, then run this again"
    [ "$(id -u)" = 0 ] || fail "run as root: apt-get install $packages"
    export DEBIAN_FRONTEND=noninteractive
    echo "bootstrap: installing $packages"
    apt-get update -q
    if ! has rustup && ! apt-cache show rustup >/dev/null 2>&1; then
        fail "this release has no rustup package: install Rust with rustup's own installer, as the" \
            "Rust project's page \"Install Rust\" tells, then run this again"
    fi
    # shellcheck disable=SC2086 # a list of words
    apt-get install -q --yes --no-install-recommends $packages
fi

version=$(sed -n 's/^channel = "\(.*\)"$/\1/p' rust-toolchain.toml)
[ -n "$version" ] || fail "rust-toolchain.toml pins no channel"
if ! rustup run "$version" cargo --version >/dev/null 2>&1; then
    echo "bootstrap: installing Rust $version"
    rustup toolchain install "$version" --profile minimal --no-self-update
fi
exec cargo xtask "$@"
