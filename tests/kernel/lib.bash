# Sourced by the scripts that run inside a guest: a group with a daemon, and what one does to it.
#
# A check that fails ends the script with status 1 and says what was expected; `ok` names what held.
set -eEuo pipefail
kind=${1:?usage: SCRIPT ublk|nbd|fuse [...]}
work=$(mktemp -d)
export VOLREP_CONFIG_DIR=$work/c VOLREP_DEV_DIR=/dev/volrep
log=$work/log
# All that the kernel says; its own buffer is short.
kernel=$(mktemp)
dmesg --follow >"$kernel" 2>/dev/null &
daemon=

ok() { echo "ok: $*"; }
fail() {
    echo "FAILED: $*"
    echo "--- the daemon's log:"
    tail -n 40 "$log" || true
    echo "--- the kernel's log:"
    dmesg | tail -n 20
    trap - ERR
    kill -TERM $$ # also from a subshell
    exit 1
}
trap 'fail "line $LINENO of ${BASH_SOURCE[0]}: $BASH_COMMAND"' ERR
# is WHAT ACTUAL EXPECTED
is() { [ "$2" = "$3" ] || fail "$1 is '$2', not '$3'"; }
# Waits for a condition, at most about N seconds: within N COMMAND...
within() {
    local left=$(($1 * 50))
    shift
    until "$@"; do
        left=$((left - 1))
        [ $left -gt 0 ] || return 1
        sleep 0.02
    done
}
uptime_ms() {
    local up
    read -r up _ </proc/uptime
    echo $((10#${up/./} * 10))
}
# Kernel messages of an I/O error of a device, of whatever layer.
io_errors() { grep -E "I/O error|lost async page write|EXT4-fs error|metadata I/O error|XFS.*(error|Shutdown)" "$kernel" || true; }
# Requests that the driver has found to be in flight for long, so far.
stuck() { grep -c 'stuck request' "$kernel" || true; }

clean() {
    local job
    for job in $(jobs -p); do kill -KILL "$job" 2>/dev/null || true; done
    wait
    umount "$work" 2>/dev/null || true
}
trap clean EXIT
trap 'exit 1' TERM

# Takes a driver away: without MODULE
without() {
    echo "install $1 /bin/false" >"/etc/modprobe.d/without-$1.conf"
    rmmod "$1" 2>/dev/null || true
}

# group NAME:SIZE... : sets a group up and starts its daemon. Its files lie on the disk $SCRATCH if there is one.
group() {
    local volumes=() volume
    if [ -n "${SCRATCH:-}" ]; then
        mkfs.ext4 -Fq -E lazy_itable_init=0 "$SCRATCH"
        mount "$SCRATCH" "$work"
    fi
    for volume in "$@"; do volumes+=(--volume "${volume%%:*}=$work/${volume%%:*}.img:${volume#*:}"); done
    volrep init g --node one --listen none --journal-size 64M --cache-size 16M "${volumes[@]}" >/dev/null 2>&1
    config
    serve
}
# Changes the configuration before the first start; scripts may have their own.
config() { :; }

is_ready() { grep -q ' ready$' "$log" || ! kill -0 "$daemon" 2>/dev/null; }
serve() {
    [ -e "$log" ] && cat "$log" >>"$log.all"
    volrep serve g 2>"$log" &
    daemon=$!
    within 60 is_ready || fail "the daemon is not ready after a minute"
    kill -0 "$daemon" 2>/dev/null || fail "the daemon has ended"
}
end() { # SIGNAL
    kill "-$1" "$daemon"
    wait "$daemon" 2>/dev/null || true
}
detach() { volrep detach g 2>"$work/detach" || fail "detach: $(cat "$work/detach")"; }
# Detach must be refused, and name who uses the device: refused_for NAME
refused_for() {
    local status=0
    volrep detach g 2>"$work/detach" || status=$?
    is "the status of detach while in use" $status 11
    grep -q -- "$1" "$work/detach" || fail "detach does not name $1: $(cat "$work/detach")"
}
# The kernel's name of the device behind a link.
node() { basename "$(readlink -f "$1")"; }
attribute() { cat "/sys/block/$(node "$1")/queue/$2"; }

# verified FILE SIZE SEED [OPTION...]: writes at random and reads everything back.
verified() {
    fio --name=verified --filename="$1" --size="$2" --randseed="$3" --rw=randwrite --bsrange=4k-64k \
        --ioengine=io_uring --iodepth=16 --fsync=32 --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
        --eta=never --output="$work/fio" "${@:4}"
}
