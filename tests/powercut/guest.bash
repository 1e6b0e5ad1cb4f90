#!/bin/bash
# What each guest runs as its first process, from its boot until its power is cut: makes the machine ready, finds its disks
# and cards, then does what comes through its ports, each script in a subshell of its own. What is printed elsewhere
# (daemons, the database) goes to the host's log. It starts few programs: under emulation each costs a twentieth of a second.
#
# The scripts use the functions below. NODE, NUMBER: from tests/powercut/guests.py.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/root LC_ALL=C.UTF-8
. /vm/settings
port() {
    local each name
    for each in /sys/class/virtio-ports/*; do
        read -r name <"$each/name"
        [ "$name" = "$1" ] && echo "/dev/${each##*/}"
    done
}
bb() { /bin/busybox "$@"; }
exec 6>"$(port out)"
exec >&6 2>&6
bb mkdir -p /dev/shm /state /tools /pg
bb mount -t tmpfs none /dev/shm
bb mount -t tmpfs -o mode=755 none /run
bb ln -s /proc/self/fd /dev/fd
pg=/usr/lib/postgresql/15/bin
postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
# within SECONDS COMMAND...
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -ge $end ] && echo "in vain: $*" && return 1
        sleep 0.1
    done
}

# A group's daemon.
serve() {
    rm -f /run/volrep/g/control.sock
    volrep serve g </dev/null >&6 2>&6 5>&- &
    echo $! >/run/daemon
    within 200 test -S /run/volrep/g/control.sock
}
running() { kill -0 "$(cat /run/daemon)" 2>/dev/null; }
gone() { ! running; }
# end SIGNAL
end() {
    kill "-$1" "$(cat /run/daemon)" && within 200 gone
}
# The database, on a device of this kind: database KIND
database() {
    local device
    case $1 in ublk) modprobe ublk_drv ;; nbd) modprobe nbd ;; esac
    device=$(volrep attach g --device "$1") || return
    mount -t ext4 "$device" /pg || return
    (cd / && postgres "$pg/postgres" -D /pg/cluster) </dev/null >&6 2>&6 5>&- &
    echo $! >/run/database
}

for block in /sys/block/vd*; do
    read -r serial <"$block/serial"
    case $serial in state | backing | tools) bb ln -s "/dev/${block##*/}" "/dev/$serial" ;; esac
done
bb mount -t ext4 -o ro /dev/tools /tools
bb ln -s /tools/volrep /usr/bin/volrep
bb modprobe virtio_net
bb ip link set lo up
for card in /sys/class/net/eth*; do
    read -r address <"$card/address"
    case $address in
    52:54:00:77:*) address=10.77.0.$NUMBER/24 ;;
    *) address=10.0.2.15/24 ;;
    esac
    bb ip addr add "$address" dev "${card##*/}"
    bb ip link set "${card##*/}" mtu "$(<"$card/mtu")" up
done
bb mount -t ext4 /dev/state /state || exit 1
bb mkdir -p /state/etc /state/lib
bb ln -sfn /state/etc /etc/volrep
bb ln -sfn /state/lib /var/lib/volrep

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
echo ready >"$(port status)"
answer look &
answer act
