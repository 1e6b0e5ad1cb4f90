#!/bin/bash
# A device of each kind: its limits, its links, who uses it, and file systems on it. device.bash KIND
. "$(dirname "$0")/lib.bash"

udevadm control --ping 2>/dev/null || /usr/lib/systemd/systemd-udevd --daemon 2>/dev/null
# `auto` takes the best that there is.
case $kind in
ublk) name='ublkb*' ;;
nbd) name='nbd*' && without ublk_drv ;;
fuse) name='loop*' && without ublk_drv && without nbd ;;
esac
group data:96M wal:400M
devices=$(volrep attach g --device auto)
is "the devices" "$devices" "/dev/volrep/g/data
/dev/volrep/g/wal"
data=/dev/volrep/g/data wal=/dev/volrep/g/wal
for device in $data $wal; do
    # shellcheck disable=SC2053 # a pattern
    [[ $(node $device) == $name ]] || fail "auto has taken $(node $device) for $device"
done
ok "$kind: auto takes it, and links lead to it"

for device in $data $wal; do
    [ -b "$device" ] || fail "$device is no block device"
    is "write_cache of $device" "$(attribute $device write_cache)" "write back"
    is "logical_block_size of $device" "$(attribute $device logical_block_size)" 512
    [ "$(attribute $device discard_max_bytes)" -ge 1048576 ] || fail "discard: $(attribute $device discard_max_bytes)"
    [ "$(attribute $device write_zeroes_max_bytes)" -ge 1048576 ] || fail "zeroes: $(attribute $device write_zeroes_max_bytes)"
done
# FUA of its own spares a flush; the loop driver has none. Only ublk can tell a physical block from a logical one.
case $kind in
ublk) fua=1 blocks='4096 512 4096' ;;
nbd) fua=1 blocks='512 512 512' ;;
fuse) fua=0 blocks='512 512 512' ;;
esac
for device in $data $wal; do
    is "fua of $device" "$(attribute $device fua)" $fua
    is "the blocks of $device" "$(lsblk -bdnro PHY-SEC,LOG-SEC,DISC-GRAN "$(readlink -f $device)")" "$blocks"
done
lsblk -o NAME,SIZE,PHY-SEC,LOG-SEC,DISC-GRAN,DISC-MAX "$(readlink -f $data)" "$(readlink -f $wal)"
is "the size of data" "$(blockdev --getsize64 $data)" $((96 << 20))
ok "$kind: sizes, blocks, write cache, FUA, discard and write-zeroes"

# A device manager that has the rules knows the link.
mkdir -p /run/udev/rules.d
cp "$(dirname "$0")"/../tools/60-volrep.rules /run/udev/rules.d/
udevadm control --reload
echo change >"/sys/block/$(node $data)/uevent"
udevadm settle
udevadm info --query=symlink --name="$(readlink -f $data)" | grep -qw volrep/g/data || fail "udev does not know the link"
echo change >"/sys/block/$(node $data)/uevent"
udevadm settle
[ -b $data ] || fail "udev took the link away"
ok "$kind: udev knows the link"

# Zeroes and discards are zeroes, on the device and below it.
dd if=/dev/urandom of=$data bs=1M count=4 oflag=direct status=none
blkdiscard --offset 1048576 --length 1048576 $data
blkdiscard --zeroout --offset 2097152 --length 1048576 $data
is "bytes other than zero after a discard and a zero-out" \
    "$(dd if=$data bs=1M skip=1 count=2 iflag=direct status=none | tr -d '\0' | wc -c)" 0
[ "$(dd if=$data bs=1M count=1 iflag=direct status=none | tr -d '\0' | wc -c)" -gt 1000000 ] || fail "too much was zeroed"
ok "$kind: discard and write-zeroes give zeroes"

mkdir -p /mnt/d /mnt/w
mkfs.ext4 -Fq $data
mkfs.xfs -fq $wal
mount $data /mnt/d
mount $wal /mnt/w
verified /mnt/d/file 24M 1 --direct=1 || fail "fio on ext4: $(cat "$work/fio")"
verified /mnt/w/file 24M 2 || fail "fio on xfs: $(cat "$work/fio")"
refused_for /mnt/d
ok "$kind: a mounted device is not detached"
fstrim /mnt/d
umount /mnt/d
e2fsck -fn $data >/dev/null 2>&1 || fail "e2fsck"
exec 3<$wal # open twice: as a mount and as a file
umount /mnt/w
xfs_repair -n $wal >/dev/null 2>&1 || fail "xfs_repair"
refused_for "pid $$"
exec 3<&-
ok "$kind: ext4 and xfs, fio --verify and fsck; an open device is not detached"

backing=$(sha256sum <$data | cut -d' ' -f1)
nodes="$(node $data) $(node $wal)"
# udev looks at a device again that a writer has closed, on a busy machine only after it has gone: those errors are its own.
udevadm settle
detach
[ -z "$(find /dev/volrep -type l 2>/dev/null || true)" ] || fail "links are left: $(find /dev/volrep)"
is "the backing" "$(sha256sum <"$work/data.img" | cut -d' ' -f1)" "$backing"
for name in $nodes; do
    case $(cat "/sys/block/$name/size" 2>/dev/null || echo 0) in 0) ;; *) fail "$name is still there" ;; esac
done
ok "$kind: detach takes links and devices away and leaves every byte in the backing"
is "I/O errors" "$(io_errors)" ""

# What can't be attached whole is not attached at all.
ours() { find /dev/volrep -type l 2>/dev/null || true; ls "$work/c/run/g/attached.json" 2>/dev/null || true; case $kind in
    ublk) find /sys/block -name 'ublkb*' ;;
    nbd) grep -ls volrep /sys/block/nbd*/backend || true ;;
    fuse) losetup --all ;;
esac; }
mkdir -p /dev/volrep/g
nothing() { [ -z "$(ours)" ]; }
# fails_to_attach WHY
fails_to_attach() {
    local status=0
    volrep attach g --device "$kind" 2>"$work/attach" || status=$?
    is "the status of an attach without a link" $status 1
    grep -q -- "$1" "$work/attach" || fail "attach: $(cat "$work/attach")"
    within 10 nothing || fail "left of it: $(ours)"
}
touch $wal
fails_to_attach "$wal.*move it away"
rm $wal
mkdir $wal.new # where the link is made, so this is found when the first device is there
fails_to_attach "Is a directory"
rmdir $wal.new
is "the devices" "$(volrep attach g --device "$kind")" "$devices"
udevadm settle
detach
within 10 nothing || fail "left after a detach: $(ours)"
ok "$kind: of an attach that fails half way nothing is left, and the next one succeeds"
end TERM
