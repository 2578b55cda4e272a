#!/bin/sh
# Runs `cargo xtask` with the given words on a machine that may have no Rust yet:
#     sh xtask/bootstrap.sh demo
# Installs what is missing of a C compiler, Rust, and nothing else.
set -eu
cd "$(dirname "$0")/.."
PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
export PATH

fail() {
    echo "bootstrap: $*" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

install() {
    has apt-get || fail "this is not Debian or Ubuntu: install $*, then run this again"
    [ "$(id -u)" = 0 ] || fail "as root, run: apt-get install $*"
    echo "bootstrap: installing $*"
    DEBIAN_FRONTEND=noninteractive apt-get install -q --yes --no-install-recommends "$@"
}

# Whether the distribution has a package, of at least version $2 if that is given.
offers() {
    offered=$(LC_ALL=C apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: \([0-9].*\)$/\1/p')
    [ -n "$offered" ] && dpkg --compare-versions "$offered" ge "${2:-0}"
}

version=$(sed -n 's/^channel = "\(.*\)"$/\1/p' rust-toolchain.toml)
[ -n "$version" ] || fail "rust-toolchain.toml pins no channel"

if ! has cc || ! has cargo; then
    has apt-get && [ "$(id -u)" = 0 ] && apt-get update -q
fi
has cc || install gcc libc6-dev
if ! has cargo; then
    if offers rustup; then
        install rustup ca-certificates
    elif offers rustc-web "$version"; then
        # Debian 12 has no rustup, but the Rust that its web browsers are built with.
        install rustc-web cargo-web rust-web-src ca-certificates
    else
        fail "this system has no package of rustup, nor of Rust $version: install Rust with rustup's own" \
            "installer, as the Rust project's page \"Install Rust\" tells, then run this again"
    fi
fi
if has rustup && ! rustup run "$version" cargo --version >/dev/null 2>&1; then
    echo "bootstrap: installing Rust $version"
    rustup toolchain install "$version" --profile minimal --no-self-update
fi
exec cargo xtask "$@"
