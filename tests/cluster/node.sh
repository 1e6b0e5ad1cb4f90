#!/bin/bash
# Becomes pid 1 of a node: an overlay of / on a tmpfs, with a /dev, /run and /dev/shm of its own.
#   node.sh NAME TOP [CGROUP]    TOP/NAME holds: upper work root disk; TOP/fence is shared with the fencer
# With a cgroup (of version 2) of its own pid 1 is systemd, with nothing but a D-Bus; else a shell.
set -euo pipefail
cgroup=${3:-}
if [ -n "$cgroup" ] && [ -z "${NODE_IN_CGROUP:-}" ]; then
    mkdir -p "$cgroup"
    echo 0 >"$cgroup/cgroup.procs"
    NODE_IN_CGROUP=1 exec unshare --cgroup bash "$0" "$@"
fi
name=$1 top=$2 dir=$2/$1
root=$dir/root
hostname "$name"
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" "$root"
mount -t proc proc "$root/proc"
# A machine that was killed and starts again has another one, and an empty memory.
cat /proc/sys/kernel/random/uuid >"$dir/boot_id"
mount --bind "$dir/boot_id" "$root/proc/sys/kernel/random/boot_id"
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
if [ -n "$cgroup" ]; then
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    touch "$root/dev/console"
    mount --bind /dev/null "$root/dev/console"
    # What a machine does when it boots has been done, and is not done to the one that this one is a part of.
    rm -rf "$root"/{usr/lib,etc}/systemd/system/*.wants "$root"/usr/lib/systemd/system-generators
    printf '[Unit]\nDefaultDependencies=no\nWants=dbus.service\n' >"$root/etc/systemd/system/node.target"
    echo "$name" >"$root/etc/hostname"
    exec chroot "$root" /usr/bin/env -i container=lab PATH="$PATH" /lib/systemd/systemd --system --unit=node.target --log-target=null
fi
exec chroot "$root" /bin/bash -c '
    trap "exit 0" TERM
    echo up
    while :; do sleep 1000 & wait $!; done'
