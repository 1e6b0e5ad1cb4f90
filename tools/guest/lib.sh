# Read by every bash in the guest (BASH_ENV): what scripts share.

# Runs its words as a bash script in the second guest; its output and status come back, as with ssh.
# A program that is to stay must not keep the output: peer 'program >/run/log 2>&1 &'
peer() {
    local line held="" first=1
    exec {vm_peer}<>/dev/tcp/10.77.0.2/77 || return 255
    printf '%s\n@@end\n' "$*" >&"$vm_peer"
    while IFS= read -r line <&"$vm_peer"; do
        if [[ $line == "@@status "* ]]; then
            [ -n "$held" ] && printf '%s\n' "$held"
            exec {vm_peer}>&-
            return "${line#@@status }"
        fi
        [ $first = 0 ] && printf '%s\n' "$held"
        held=$line first=0
    done
    exec {vm_peer}>&-
    echo "peer: the second guest hung up" >&2
    return 255
}

peer_is_up() {
    local tries
    for ((tries = 0; tries < 300; tries++)); do
        (exec 3<>/dev/tcp/10.77.0.2/77) 2>/dev/null && return
        sleep 0.1
    done
    echo "vm: the second guest did not come up" >&2
    return 1
}

say() { printf '%s %s\n' "$(cut -d' ' -f1 /proc/uptime)" "$*"; }

# wait_for SECONDS COMMAND...: until it succeeds; fails when the time is over.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -ge $end ] && echo "waited in vain for: $*" >&2 && return 1
        sleep 0.1
    done
}
