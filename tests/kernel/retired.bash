#!/bin/bash
# An old primary whose device is in use when it comes back: its users get errors and not a wait without an end, and
# the device goes once they have let go of it. It gets the place back, and calls its start script. retired.bash KIND
. "$(dirname "$0")/lib.bash"

second() { VOLREP_CONFIG_DIR=$work/c2 VOLREP_DEV_DIR=$work/dev2 volrep "$@"; }
state() { volrep status g --json | grep -q "\"role\":\"$1\".*\"state\":\"$2\""; }
second_state() { second status g --json | grep -q "\"role\":\"$1\".*\"state\":\"$2\""; }
missed() { second status g --json | grep -q '"state":"Disconnected"'; }

mkfs.ext4 -Fq -E lazy_itable_init=0 "$SCRATCH"
mount "$SCRATCH" "$work"
sizes=(--journal-size 64M --cache-size 16M)
volrep init g --node one --listen 127.0.0.1:7001 "${sizes[@]}" --volume "data=$work/data.img:64M" >/dev/null 2>&1
volrep token g --peer two 2>/dev/null >"$work/token"
second join - --listen 127.0.0.1:7002 "${sizes[@]}" --volume "data=$work/two.img" <"$work/token" >/dev/null 2>&1
printf '\n[[peer]]\nname = "two"\naddress = "127.0.0.1:7002"\n' >>"$work/c/g.toml"
# What the start script is to the kernel: its flags (proc(5), the ninth field of stat), and how soon it is killed.
cat >"$work/start" <<EOF
#!/bin/sh
{ cut -d' ' -f9 /proc/self/stat; cat /proc/self/oom_score_adj; } >$work/started.new
mv $work/started.new $work/started
EOF
chmod +x "$work/start"
sed -i "s|^#* *start = .*|start = \"$work/start\"|" "$work/c/g.toml"
grep -q "^start = " "$work/c/g.toml" || fail "no place for a start script: $(cat "$work/c/g.toml")"
serve
VOLREP_CONFIG_DIR=$work/c2 VOLREP_DEV_DIR=$work/dev2 volrep serve g 2>"$work/log2" &
within 60 second_state shadow UpToDate || fail "the shadow does not follow"

data=$(volrep attach g --device "$kind")
name=$(node "$data")
mkfs.ext4 -q "$data"
mkdir "$work/mnt"
mount "$data" "$work/mnt"
# Somebody who writes all the time, until he gets an error.
(
    set +eE
    trap - ERR
    n=0
    while echo "$n" >"$work/mnt/b" && sync "$work/mnt/b"; do n=$((n + 1)); done 2>/dev/null
    touch "$work/refused"
) &
sleep 1
end KILL
sleep 1
[ ! -e "$work/refused" ] || fail "the device has failed before the next daemon"
within 60 missed || fail "the shadow does not miss the primary"
second promote g --i-fenced-the-old-primary --yes >/dev/null 2>&1 || fail "promote: $(cat "$work/log2")"
serve
within 60 state shadow Retired || fail "$(volrep status g)"
within 60 test -e "$work/refused" || fail "who writes waits on, and gets no error"
ok "$kind: who waited for the old primary has got an error"

status=0
volrep rejoin g --yes 2>"$work/told" || status=$?
is "the status of rejoin while in use" $status 11
grep -q "mounted on $work/mnt" "$work/told" || fail "rejoin does not name the mount: $(cat "$work/told")"
within 60 umount "$work/mnt" || fail "it can't be unmounted"
volrep rejoin g --yes >/dev/null 2>"$work/told" || fail "rejoin: $(cat "$work/told")"
[ ! -L "$data" ] || fail "the link to the device stays"
within 60 state shadow UpToDate || fail "$(volrep status g)"
volrep salvage g list
second verify g || fail "it is not equal"
ok "$kind: $name is gone, and the old primary follows"

# PF_MEMALLOC_NOIO of linux/sched.h: the daemon has it, as it serves a block device.
no_io=$((0x80000))
flags=$(cut -d' ' -f9 "/proc/$daemon/stat")
[ $((flags & no_io)) != 0 ] || fail "the daemon is no I/O flusher: $flags"
echo -900 >"/proc/$daemon/oom_score_adj"
second switchover g --to one --yes >/dev/null 2>"$work/told" || fail "switchover: $(cat "$work/told")"
within 60 test -e "$work/started" || fail "the start script was not called: $(volrep status g)"
{ read -r flags && read -r adjusted; } <"$work/started"
[ $((flags & no_io)) = 0 ] || fail "the start script is an I/O flusher, too: $flags"
is "the start script's oom_score_adj" "$adjusted" 0
ok "$kind: the start script is no part of the block device"
