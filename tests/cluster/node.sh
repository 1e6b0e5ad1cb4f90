#!/bin/bash
# Becomes pid 1 of a node: an overlay of / on a tmpfs, with a /dev, /run and /dev/shm of its own.
#   node.sh NAME TOP    TOP/NAME holds: upper work root disk; TOP/fence is shared with the fencer
set -euo pipefail
name=$1 top=$2 dir=$2/$1
root=$dir/root
hostname "$name"
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir -p "$root"/dev/{shm,pts} "$root"/run/{lock,postgresql,resource-agents,fence,lock/lvm} "$root"/pg "$root"/var/lib/volrep
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
for device in null zero full random urandom tty fuse loop-control; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
for number in $(seq 0 63); do mknod "$root/dev/loop$number" b 7 "$number"; done
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
chown postgres: "$root/run/postgresql"
mount --bind "$dir/disk" "$root/var/lib/volrep"
mount --bind "$top/fence" "$root/run/fence"
exec chroot "$root" /bin/bash -c '
    trap "exit 0" TERM
    echo up
    while :; do sleep 1000 & wait $!; done'
