#!/bin/bash
# What only kernel NBD has: a limit to waiting, neighbours on the same driver, and `auto`. nbd_alone.bash nbd
. "$(dirname "$0")/lib.bash"
config() { sed -i 's/^dead_after = .*/dead_after = "3s"/' "$work/c/g.toml"; }

# Where there is ublk, `auto` takes that.
without ublk_drv
# A neighbour's device on the same driver.
truncate -s 16M /tmp/neighbour
nbdkit -U /tmp/neighbour.sock --run 'sleep infinity' file /tmp/neighbour &
neighbour=$!
within 10 test -S /tmp/neighbour.sock
nbd-client -unix /tmp/neighbour.sock /dev/nbd0 -persist >"$work/client" 2>&1 || fail "nbd-client: $(cat "$work/client")"
before=$(cat /sys/block/nbd0/size)
[ "$before" -gt 0 ] || fail "the neighbour's device is empty"

group data:64M
link=$(volrep attach g --device auto 2>"$work/attach")
is "the device" "$(node "$link")" nbd1
grep -q 'not attached by ublk: ' "$log" || fail "auto does not say why there is no ublk"
ok "nbd: auto takes the kernel's NBD driver, leaves the neighbour's device alone, and says why not ublk"

verified "$link" 16M 1 --direct=1 || fail "fio: $(cat "$work/fio")"
mkfs.ext4 -Fq "$link"
mkdir -p /mnt/d
mount "$link" /mnt/d
end KILL
dd if=/dev/zero of=/mnt/d/late bs=1M count=8 conv=fsync status=none 2>/dev/null &
writer=$!
since=$(uptime_ms)
dd if="$link" of=/dev/null bs=4k count=1 iflag=direct status=none 2>/dev/null && fail "a dead device answers"
took=$(($(uptime_ms) - since))
[ $took -ge 2500 ] && [ $took -le 8000 ] || fail "an error after $took ms, not after about 3000"
ok "nbd: with nobody to serve it, a device gives errors after dead_after ($took ms for 3 s)"
serve
wait $writer && fail "a write to a device that was given up succeeded"
is "the new device" "$(node "$link")" nbd2
dd if="$link" of=/dev/null bs=1M count=4 iflag=direct status=none || fail "the new device does not answer"
umount /mnt/d
e2fsck -fy "$link" >/dev/null 2>&1 || true
mount "$link" /mnt/d
echo again >/mnt/d/again
sync
umount /mnt/d
within 10 test ! -e /sys/block/nbd1/backend || fail "the device that was given up is still ours"
ok "nbd: the next daemon makes a clean device, also while the old one is mounted"

# A daemon that stops in order while nobody uses the device, and stays away for longer than the limit.
end TERM
sleep 4
serve
is "the device after a long stop" "$(node "$link")" nbd2
dd if="$link" of=/dev/null bs=4k count=1 iflag=direct status=none || fail "it does not answer"
ok "nbd: a device that nobody waited on is taken over however late"

# Somebody disconnects our device behind our back, and gives its number away.
nbd-client -d /dev/nbd2 >/dev/null
within 10 test ! -e /sys/block/nbd2/backend || fail "nbd-client did not disconnect"
nbd-client -unix /tmp/neighbour.sock /dev/nbd2 >"$work/client" 2>&1 || fail "nbd-client: $(cat "$work/client")"
detach
[ "$(cat /sys/block/nbd2/size)" -gt 0 ] || fail "detach took a neighbour's device away"
dd if=/dev/nbd2 of=/dev/null bs=4k count=1 iflag=direct status=none || fail "the neighbour's device is broken"
nbd-client -d /dev/nbd2 >/dev/null
ok "nbd: a number that has been given away is not touched"

# Detach without a daemon that has it open: the reattach failed.
volrep attach g --device nbd >/dev/null
name=$(node "$link")
end TERM
rm "$work/c/run/g/attached.json" # nothing is remembered, so nothing is attached
serve
[ -e "/sys/block/$name/backend" ] || fail "the device is gone"
volrep attach g --device nbd >/dev/null
is "the device" "$(node "$link")" "$name"
ok "nbd: a device is found again without any note of it"
detach

# A partition counts as the device.
volrep attach g --device nbd >/dev/null
name=$(node "$link")
# One entry: Linux, from sector 2048, 32768 sectors; and the signature.
printf '\0\0\0\0\203\0\0\0\0\010\0\0\0\200\0\0' | dd of="$link" bs=1 seek=446 conv=notrunc status=none
printf '\125\252' | dd of="$link" bs=1 seek=510 conv=notrunc status=none
blockdev --rereadpt "$link"
within 10 test -b "/dev/${name}p1" || fail "there is no partition"
mkfs.ext4 -Fq "/dev/${name}p1"
mount "/dev/${name}p1" /mnt/d
refused_for /mnt/d
umount /mnt/d
detach
ok "nbd: a mounted partition keeps its device"

# Blocks of 4096 bytes.
truncate -s 64M "$work/big"
loop=$(losetup --find --show --sector-size 4096 "$work/big")
volrep init h --node one --listen none --journal-size 16M --cache-size 16M --volume "v=$loop" >/dev/null 2>&1
volrep serve h 2>"$work/h.log" &
other=$!
within 30 grep -q ' ready$' "$work/h.log" || fail "$(cat "$work/h.log")"
device=$(volrep attach h --device nbd)
is "its logical block" "$(attribute "$device" logical_block_size)" 4096
is "its physical block" "$(attribute "$device" physical_block_size)" 4096
verified "$device" 16M 5 --direct=1 || fail "fio: $(cat "$work/fio")"
volrep detach h 2>/dev/null
kill -TERM $other
wait $other
losetup --detach "$loop"
ok "nbd: a volume with blocks of 4096 bytes"

is "the neighbour's size" "$(cat /sys/block/nbd0/size)" "$before"
nbd-client -d /dev/nbd0 >/dev/null
kill $neighbour
end TERM
