#!/usr/bin/env bash
# Two hosts on one machine, to try a deployment over a network: two network namespaces of the kernel with an address each and a cable
# between them, and no other way in or out. Needs root and iproute2.
#
#   deploy/two-hosts.sh serve [MODEL]             on the host 192.0.2.1: dealer and server, until Ctrl-C; default: models/pylib
#   deploy/two-hosts.sh ask PROMPT [OPTION ...]   on the host 192.0.2.2, in another terminal: the client, as `privinf generate`
#
# With PRIVINF_TRUST=two-party `serve` starts no dealer. Of what `serve` makes the client gets its bundle of keys and nothing else; its cache is its own. PRIVINF names another program,
# PRIVINF_HOSTS another folder for keys and caches, and the namespaces are called after it.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
program=${PRIVINF:-$root/.venv/bin/privinf}
place=${PRIVINF_HOSTS:-$root/runs/privinf-hosts}
name=$(basename "$place")
far=192.0.2.1 near=192.0.2.2
trust=${PRIVINF_TRUST:-dealer}

usage() {
    echo "usage: deploy/two-hosts.sh serve [MODEL] | ask PROMPT [OPTION ...]" >&2
    exit 2
}

on() { # HOST COMMAND ...
    ip netns exec "$name-$1" "${@:2}"
}

serve() {
    local model=$1 host
    if ip netns list | grep -q "^$name-far\b"; then
        echo "two-hosts: $name-far is there already; another call serves, or: ip netns del $name-far" >&2
        exit 2
    fi
    trap 'exit 0' INT TERM
    trap stop EXIT
    for host in far near; do
        ip netns add "$name-$host"
        on "$host" ip link set lo up
    done
    on far ip link add name cable type veth peer name cable netns "$name-near"
    on far ip address add "$far/24" dev cable
    on near ip address add "$near/24" dev cable
    for host in far near; do
        on "$host" ip link set cable up
    done
    (umask 077 && mkdir -p "$place")
    [ -e "$place/keys/ca.key" ] || $program keys init --keys "$place/keys" --host "$far" >/dev/null
    # not by `on`, whose shell would get the signals in place of the program
    if [ "$trust" = dealer ]; then
        ip netns exec "$name-far" $program dealer --listen "$far:7001" --keys "$place/keys/dealer" --cache "$place/dealer" &
    fi
    ip netns exec "$name-far" $program serve "$model" --listen "$far:7000" --dealer "$far:7001" --trust "$trust" --keys "$place/keys/server" \
        --cache "$place/server" &
    wait -n || true # either of them has ended
    exit 1
}

stop() {
    set +e
    kill $(jobs -p) 2>/dev/null
    wait
    ip netns del "$name-far" 2>/dev/null
    ip netns del "$name-near" 2>/dev/null
}

case ${1:-} in
serve)
    [ $# -le 2 ] || usage
    serve "${2:-$root/models/pylib}"
    ;;
ask)
    [ $# -ge 2 ] || usage
    on near $program generate --server "$far:7000" --dealer "$far:7001" --keys "$place/keys/client" --cache "$place/client" \
        --prompt "$2" "${@:3}"
    ;;
*) usage ;;
esac
