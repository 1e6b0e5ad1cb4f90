#!/bin/bash
# What each guest runs from its boot until its power is cut: finds its disks and cards, then does what comes through its
# ports, each script in a subshell of its own. What is printed elsewhere (daemons, the database) goes to the host's log.
#
# The scripts use the functions below. NODE, NUMBER: from tests/powercut/guests.py.
exec 6>&1
at() { echo "$(cut -d' ' -f1 /proc/uptime) $*" >&6; }
at script
pg=/usr/lib/postgresql/15/bin
postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
# within SECONDS COMMAND...
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -ge $end ] && echo "in vain: $*" && return 1
        sleep 0.05
    done
}

# A group's daemon.
serve() {
    at serve
    rm -f /run/volrep/g/control.sock
    volrep serve g </dev/null >&6 2>&6 5>&- &
    echo $! >/run/daemon
    within 60 test -S /run/volrep/g/control.sock; at served
}
running() { kill -0 "$(cat /run/daemon)" 2>/dev/null; }
gone() { ! running; }
# end SIGNAL
end() {
    kill "-$1" "$(cat /run/daemon)" && within 60 gone
}
# The database, on a device of this kind: database KIND
database() {
    local device
    [ "$1" = ublk ] && modprobe ublk_drv
    [ "$1" = nbd ] && modprobe nbd
    device=$(volrep attach g --device "$1") || return
    at attached
    mkdir -p /pg
    mount -t ext4 "$device" /pg || return
    (cd / && postgres "$pg/postgres" -D /pg/cluster) </dev/null >&6 2>&6 5>&- &
    echo $! >/run/database
}

for block in /sys/block/vd*; do
    serial=$(<"$block/serial")
    case $serial in state | backing) ln -s "/dev/${block##*/}" "/dev/$serial" ;; esac
done
at disks
modprobe virtio_net
at modprobe
for card in /sys/class/net/eth*; do
    case $(<"$card/address") in
    52:54:00:77:*) address=10.77.0.$NUMBER/24 ;;
    *) address=10.0.2.15/24 ;;
    esac
    ip addr add "$address" dev "${card##*/}"
    ip link set "${card##*/}" up
done
mkdir -p /state
mount -t ext4 /dev/state /state || exit 1
at mounted
mkdir -p /state/etc /state/lib
ln -sfn /state/etc /etc/volrep
ln -sfn /state/lib /var/lib/volrep

port() {
    local each
    for each in /sys/class/virtio-ports/*; do
        [ "$(<"$each/name")" = "$1" ] && echo "/dev/${each##*/}"
    done
}
answer() {
    local line text=
    exec 5<>"$(port "$1")"
    while IFS= read -r line <&5; do
        if [ "$line" != @@end ]; then
            text+=$line$'\n'
            continue
        fi
        (eval "$text") </dev/null >&5 2>&1
        printf '\n@@status %d\n' $? >&5
        text=
    done
}
at answering
answer look &
answer act
