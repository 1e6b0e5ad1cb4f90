#!/bin/bash
# What each kind of device owes to those who ask for durability: a write is complete without the disk, FLUSH
# and FUA are not, and an error stays one. The journal lies on a disk that can be stopped and broken.
# durable.bash KIND
. "$(dirname "$0")/lib.bash"

modprobe dm_mod
truncate -s 160M /root/disk
below=$(losetup --find --show /root/disk)
sectors=$(blockdev --getsz "$below")
whole="0 $sectors linear $below 0" broken="0 $sectors error"
dmsetup create slow --noudevsync --table "$whole"
dmsetup mknodes slow
mkfs.ext4 -Fq /dev/mapper/slow
mkdir -p /mnt/j
mount /dev/mapper/slow /mnt/j
stop() { dmsetup suspend --noflush --nolockfs slow; }
resume() { dmsetup resume --noudevsync slow; }
# Becomes whole or broken.
becomes() {
    stop
    dmsetup load slow --table "$1"
    resume
}

volrep init g --node one --listen none --journal-dir /mnt/j/g --journal-size 64M --cache-size 16M \
    --volume "data=$work/data.img:64M" >/dev/null 2>&1
serve
device=$(volrep attach g --device "$kind")
# One block that says its number, at its place: put NUMBER [FLAG...]
put() { head -c 4096 < <(yes "$1") | dd of="$device" bs=4k seek="$1" iflag=fullblock conv=notrunc status=none "${@:2}"; }
put 1 oflag=direct,dsync

stop
since=$(uptime_ms)
timeout 20 bash -c "$(declare -f put); device=$device; put 2 oflag=direct" || fail "a write waits for the disk"
took=$(($(uptime_ms) - since))
ok "$kind: a write is complete while the journal's disk stands still ($took ms)"
put 3 oflag=direct,dsync & fua=$!
put 4 oflag=direct conv=notrunc,fsync & flush=$!
sleep 2
kill -0 $fua 2>/dev/null || fail "a durable write did not wait for the disk"
kill -0 $flush 2>/dev/null || fail "a flush did not wait for the disk"
resume
wait $fua || fail "the durable write: $?"
wait $flush || fail "the flush: $?"
ok "$kind: a durable write and a flush wait until the journal's disk goes on"

becomes "$broken"
if put 5 oflag=direct,dsync 2>"$work/dd"; then fail "a durable write to a broken disk succeeded"; fi
grep -q 'Input/output error' "$work/dd" || fail "the error is another: $(cat "$work/dd")"
becomes "$whole"
for _ in 1 2 3; do
    if put 6 oflag=direct,dsync 2>/dev/null; then fail "a success over an error, once the disk was whole again"; fi
done
volrep status g --json | jq -e '.state == "Failed"' >/dev/null || fail "status: $(volrep status g)"
volrep status g | grep -q 'action: ' || fail "no action: $(volrep status g)"
ok "$kind: after an error nothing succeeds until the daemon is started again, though the disk is whole"

[ "$kind" != fuse ] || volrep detach g >/dev/null 2>&1 || true
end KILL
umount /mnt/j
e2fsck -fy /dev/mapper/slow >/dev/null 2>&1 || true
mount /dev/mapper/slow /mnt/j
serve
device=$(volrep attach g --device "$kind")
for n in 1 2 3 4; do
    is "block $n" "$(dd if="$device" bs=4k skip=$n count=1 iflag=direct status=none | tr -d '\0' | head -1)" $n
done
put 7 oflag=direct,dsync || fail "the next daemon does not write"
ok "$kind: the next daemon has everything that was acknowledged"

# Its own device waits for it: killed in that moment, it may not keep out the one that can answer.
if [ "$kind" != fuse ]; then
    stop
    put 8 oflag=direct
    killed=$daemon
    volrep detach g >"$work/detach" 2>&1 & detaching=$!
    claimed() { find "/proc/$killed/fd" -lname "$(readlink -f "$device")" 2>/dev/null | grep -q .; }
    within 20 claimed || fail "detach does not begin: $(cat "$work/detach")"
    sleep 1 # what does not wait has ended by then
    kill -0 $detaching 2>/dev/null || fail "detach does not wait for the disk: $(cat "$work/detach")"
    kill -KILL "$killed"
    resume
    wait $detaching && fail "detach succeeded without a daemon"
    next() {
        sleep 0.3
        volrep serve g 2>"$log" &
        daemon=$!
        within 60 is_ready && kill -0 "$daemon" 2>/dev/null
    }
    within 1 next || fail "the killed daemon keeps out the next one"
    wait "$killed" && fail "it was not killed"
    is "block 8" "$(dd if="$device" bs=4k skip=8 count=1 iflag=direct status=none | tr -d '\0' | head -1)" 8
    ok "$kind: a daemon that is killed while it waits for its own device lets the next one in"
fi
detach
end TERM
umount /mnt/j
dmsetup remove --force --noudevsync slow
losetup --detach "$below"
