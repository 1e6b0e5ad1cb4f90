#!/bin/bash
# Views of a shadow as devices of each kind: what they refuse, who uses them, and what a killed daemon leaves of them.
# view.bash KIND
. "$(dirname "$0")/lib.bash"

mkfs.ext4 -Fq -E lazy_itable_init=0 "$SCRATCH"
mount "$SCRATCH" "$work"
# Both nodes are this machine: each with files of its own.
east() { VOLREP_CONFIG_DIR=$work/east VOLREP_SHM_DIR=/dev/shm/east volrep "$@"; }
west() { VOLREP_CONFIG_DIR=$work/west VOLREP_SHM_DIR=/dev/shm/west volrep "$@"; }
for node in east west; do mkdir -p "$work/$node"; done
east init g --node east --listen 127.0.0.1:7654 --journal-size 64M --volume "data=$work/east.img:96M" >/dev/null 2>&1
east token g --peer west >"$work/token"
west join - --node west --listen none --journal-size 64M --volume "data=$work/west.img" <"$work/token" >/dev/null 2>&1
# Not by the functions: these processes are to be the ones that are killed.
VOLREP_CONFIG_DIR=$work/east VOLREP_SHM_DIR=/dev/shm/east volrep serve g 2>"$work/east.log" &
log=$work/west.log
serve_west() {
    VOLREP_CONFIG_DIR=$work/west VOLREP_SHM_DIR=/dev/shm/west volrep serve g 2>>"$log" &
    daemon=$!
}
told() { west status g --json | python3 -c "import json,sys; s=json.load(sys.stdin); print($1)"; }
current() { [ "$(told 's["state"]')" = UpToDate ] && [ "$(told 's["applied_lsn"]')" = "$(lsn)" ]; }
lsn() { east status g --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["tail_lsn"])'; }
serve_west
within 60 east attach g --device "$kind" >/dev/null 2>&1 || fail "not attached: $(cat "$work/east.log")"
data=/dev/volrep/g view=/dev/volrep/g.view
mkfs.ext4 -q $data
mkdir "$work/fs" "$work/view"
mount $data "$work/fs"
head -c 8M /dev/urandom >"$work/fs/file"
sync -f "$work/fs/file"
sum=$(sha256sum <"$work/fs/file")
within 60 current || fail "the shadow does not follow: $(west status g)"

# Read-only: the kernel knows it.
is "the device" "$(west view g --read-only --device "$kind" 2>/dev/null)" $view
is "ro of $view" "$(cat "/sys/block/$(node $view)/ro")" 1
if dd if=/dev/zero of=$view bs=4k count=1 oflag=direct status=none 2>/dev/null; then fail "it was written to"; fi
whole() { sha256sum < <(dd if=$view bs=1M iflag=direct status=none); }
before=$(whole)
rm "$work/fs/file"
head -c 4M /dev/urandom >"$work/fs/other"
sync -f "$work/fs/other"
is "what the view shows" "$(whole)" "$before"
sleep 1000 <$view &
user=$!
status=0
west view g --close 2>"$work/said" || status=$?
is "the status of a close while in use" $status 11
grep -q "pid $user" "$work/said" || fail "who uses it is not told: $(cat "$work/said")"
kill $user
wait $user 2>/dev/null || true
west view g --close 2>/dev/null
[ ! -e $view ] || fail "$view is there still"
within 60 current || fail "the shadow does not catch up: $(west status g)"
ok "$kind: a read-only view is read-only, stays as it was, and is closed once nobody uses it"

# Scratch: a file system with a journal to replay.
west view g --scratch --device "$kind" >/dev/null 2>&1
is "ro of $view" "$(cat "/sys/block/$(node $view)/ro")" 0
mount $view "$work/view"
[ ! -e "$work/view/file" ] || fail "what was removed is there"
head -c 4M /dev/urandom >"$work/view/mine"
sync -f "$work/view/mine"
umount "$work/view"
e2fsck -fn $view >/dev/null 2>&1 || fail "the file system of the view is damaged"
west view g --close 2>/dev/null
ok "$kind: a file system in a scratch view"

# A killed daemon: whoever uses its view gets errors, is not made to wait for the next one, and nothing of it is shown again.
west view g --scratch --device "$kind" >/dev/null 2>&1
mount $view "$work/view"
old=$(readlink -f $view)
head -c 1M /dev/urandom >"$work/view/mine"
sync -f "$work/view/mine"
end KILL
head -c 1M /dev/urandom >"$work/view/more" 2>/dev/null || true
if timeout 60 sync -f "$work/view" 2>/dev/null; then fail "the dead view has taken a write"; else status=$?; fi
[ $status != 124 ] || fail "whoever uses the dead view waits"
serve_west
within 60 test ! -L $view || fail "the next daemon has left $view"
is "the view" "$(told 's["view"]')" None
umount -l "$work/view"
within 60 current || fail "the shadow does not follow: $(west status g)"
west view g --read-only --device "$kind" >/dev/null 2>"$work/said" || fail "no new view: $(cat "$work/said")"
mount -o ro,noload $view "$work/view"
cmp "$work/view/other" "$work/fs/other"
umount "$work/view"
west view g --close 2>/dev/null
ok "$kind: the users of a killed daemon's view get errors ($old), and the next view is a new one"

# Nothing of it all is on the shadow.
umount "$work/fs"
east detach g 2>/dev/null
within 60 current || fail "the shadow does not follow: $(west status g)"
end TERM
cmp "$work/east.img" "$work/west.img"
ok "$kind: the shadow equals its primary ($sum was there)"
