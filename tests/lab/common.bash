# SPDX-License-Identifier: Apache-2.0 OR MIT
# Shared by the lab's scripts; sourced, not run. Sets $lab (tests/lab).

lab=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf 'lab: %s\n' "$*" >&2; }

# 125: the lab itself failed. 124: timeout. Anything else is the program's own status.
die() {
    say "$@"
    exit 125
}

# Prints the commands among "$@" that are not installed.
missing() {
    local tool
    for tool in "$@"; do
        command -v "$tool" >/dev/null 2>&1 || printf '%s ' "$tool"
    done
}

# Fails unless all commands are there. In a CI job that runs as root they are installed.
need() { # PACKAGES COMMAND...
    local packages=$1 absent
    shift
    absent=$(missing "$@")
    [ -n "$absent" ] || return 0
    if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ]; then
        # shellcheck disable=SC2086 # a list of names
        install_packages $packages
        absent=$(missing "$@")
    fi
    [ -z "$absent" ] || die "not installed: $absent(Debian packages: $packages); tests/lab/setup installs them"
}

# Adds what is absent; upgrades nothing that is there.
install_packages() {
    command -v apt-get >/dev/null || die "no apt-get here; install by hand: $*"
    [ "$(id -u)" = 0 ] || die "not root; run: apt-get install --no-install-recommends $*"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-upgrade --no-install-recommends "$@"; } >&2 ||
        die "apt-get could not install: $*"
}

run_packages='qemu-system-x86 busybox-static'
run_tools='qemu-system-x86_64 busybox'
build_packages='gcc make libc6-dev flex bison bc libelf-dev libssl-dev xz-utils patch perl'
build_tools='gcc make flex bison bc xz patch perl'

# Kernel image that belongs to this patch and this configuration.
cached_kernel() {
    local sum
    sum=$(cat "$lab/kernel/snp-emulation.patch" "$lab/kernel/kernel.config.fragment" | sha256sum)
    printf '%s/cvm-memory/lab/bzImage-%s\n' "${XDG_CACHE_HOME:-$HOME/.cache}" "${sum:0:16}"
}
