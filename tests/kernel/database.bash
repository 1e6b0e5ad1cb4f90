#!/bin/bash
# PostgreSQL on a device, with checksums, through the death of the daemon. database.bash KIND
. "$(dirname "$0")/lib.bash"
bin=$(echo /usr/lib/postgresql/*/bin)
cluster=/mnt/pg/data
cd /tmp # where the database's user may be, too
postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }

group pg:512M
device=$(volrep attach g --device "$kind")
is "the device of a group of one volume" "$device" /dev/volrep/g
mkfs.ext4 -Fq "$device"
mkdir -p /mnt/pg
mount "$device" /mnt/pg
mkdir $cluster
chown postgres $cluster
postgres "$bin/initdb" --no-sync -k -A trust -D $cluster >/dev/null
postgres "$bin/pg_ctl" -w -D $cluster -l /mnt/pg/data/log -o "-k /tmp -c listen_addresses=''" start >/dev/null
postgres "$bin/pgbench" -h /tmp -i -s 2 -q postgres >/dev/null 2>&1
postgres "$bin/pgbench" -h /tmp -c 4 -j 2 -T 9 -n postgres >"$work/pgbench" 2>&1 &
bench=$!
if [ "$kind" != fuse ]; then
    for _ in 1 2; do
        sleep 2
        end KILL
        serve
    done
fi
wait $bench || fail "pgbench: $(cat "$work/pgbench")"
grep -q 'number of failed transactions: 0 ' "$work/pgbench" || fail "pgbench: $(cat "$work/pgbench")"
done=$(sed -n 's/^number of transactions actually processed: \([0-9]*\).*/\1/p' "$work/pgbench")
is "transactions in the history" "$(postgres psql -h /tmp -At -c 'select count(*) from pgbench_history' postgres)" "$done"
# The same after a crash of the database and a new mount.
postgres "$bin/pg_ctl" -w -D $cluster -m immediate stop >/dev/null
umount /mnt/pg
e2fsck -fn "$device" >/dev/null 2>&1 || [ $? -eq 0 ] || fail "e2fsck"
mount "$device" /mnt/pg
postgres "$bin/pg_ctl" -w -D $cluster -l /mnt/pg/data/log -o "-k /tmp -c listen_addresses=''" start >/dev/null
is "transactions after a crash" "$(postgres psql -h /tmp -At -c 'select count(*) from pgbench_history' postgres)" "$done"
postgres psql -q -h /tmp -c 'create extension amcheck' postgres
postgres "$bin/pg_amcheck" -h /tmp --heapallindexed postgres || fail "pg_amcheck"
postgres "$bin/pg_ctl" -w -D $cluster -m fast stop >/dev/null
postgres "$bin/pg_checksums" -c -D $cluster >/dev/null || fail "pg_checksums"
is "I/O errors" "$(io_errors)" ""
umount /mnt/pg
detach
end TERM
ok "$kind: PostgreSQL, $done transactions of pgbench, none failed or lost, every checksum right"
