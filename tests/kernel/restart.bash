#!/bin/bash
# Daemons that are killed, replaced and stopped under a verified load: nobody sees an error, no byte is
# wrong, the device stays. restart.bash KIND ROUNDS
. "$(dirname "$0")/lib.bash"
rounds=$2

group data:64M
data=$(volrep attach g --device "$kind")
name=$(node "$data")

written() { awk '{ print $5 }' "/sys/block/$name/stat"; }
# The device answers: writes complete that had not before.
goes_on() { [ "$(written)" -gt "$1" ]; }
load() {
    local n=0
    while [ ! -e "$work/stop" ]; do
        n=$((n + 1))
        verified "$data" 48M $n --direct=1 || { touch "$work/broken"; return; }
        echo $n >"$work/runs"
    done
}
load &
load=$!

pauses=() starts=()
for round in $(seq "$rounds"); do
    within 60 goes_on $(($(written) + 100)) || fail "round $round: the load does not go on"
    sleep "0.$((RANDOM % 3))$((RANDOM % 10))"
    # Requests in flight are sent again within a time of their own: first any, then all are served.
    since=$(uptime_ms)
    end KILL
    at=$(written)
    serve
    starts+=($(($(uptime_ms) - since)))
    within 60 goes_on "$at" || fail "round $round: nothing is served"
    pauses+=($(($(uptime_ms) - since)))
    if [ "${pauses[-1]}" -ge 10000 ]; then
        echo "round $round: ${pauses[-1]} ms, of which the daemon's start was ${starts[-1]}; load $(cut -d' ' -f1 /proc/loadavg)"
        cat "$log"
        dmesg | tail -n 5
    fi
    [ ! -e "$work/broken" ] || fail "round $round: $(cat "$work/fio")"
    is "the device after round $round" "$(node "$data")" "$name"
done
# What the kernel adds to the daemon's start.
added=()
for round in "${!pauses[@]}"; do added+=($((pauses[round] - starts[round]))); done
quantiles() {
    local sorted=($(printf '%s\n' "$@" | sort -n))
    echo "median ${sorted[$(($# / 2))]}, longest ${sorted[$(($# - 1))]}"
}
echo "figure: $kind: $rounds rounds of kill -9; ms from the kill to the first write after it: $(quantiles "${pauses[@]}");" \
    "to the daemon's ready: $(quantiles "${starts[@]}"); from there: $(quantiles "${added[@]}")"
# The driver's own interval would be 30 s.
for each in "${added[@]}"; do [ "$each" -lt 15000 ] || fail "requests in flight were sent again $each ms after the start"; done
touch "$work/stop"
wait $load
[ ! -e "$work/broken" ] || fail "$(cat "$work/fio")"
runs=$(cat "$work/runs")
is "I/O errors" "$(io_errors)" ""
ok "$kind: $rounds rounds of kill -9 under load, $runs runs of fio verified, no error, device kept"

# A daemon that stops in order and the next one, of another build that was put into its place meanwhile: the
# longest that a request takes is the pause.
program=$(command -v volrep)
for depth in 1 16; do
    fio --name=pause --filename="$data" --size=48M --rw=randwrite --bs=4k --ioengine=io_uring --direct=1 \
        --iodepth=$depth --fsync=64 --time_based --runtime=6 --eta=never --output="$work/pause.json" --output-format=json &
    fio=$!
    sleep 1
    # As a package manager does it: the old file stays what the old daemon runs, without a name.
    cp "$program" "$program.new"
    printf 'build %s' $depth >>"$program.new"
    mv "$program.new" "$program"
    old=$(readlink "/proc/$daemon/exe")
    is "what the old daemon runs" "$old" "$program (deleted)"
    sleep 1
    before=$(stuck)
    since=$(uptime_ms)
    end TERM
    stopped=$(uptime_ms)
    serve
    started=$(uptime_ms)
    cmp "/proc/$daemon/exe" "$program" || fail "the daemon is not of the new build"
    wait $fio || fail "fio across a restart: $(cat "$work/pause.json")"
    longest=$(jq '[.jobs[0].write.clat_ns.max, .jobs[0].sync.lat_ns.max] | max / 1e6 | round' "$work/pause.json")
    echo "figure: $kind: upgrade at queue depth $depth: longest request $longest ms" \
        "(stop $((stopped - since)) ms, start $((started - stopped)) ms)"
    is "requests left behind by a stop in order" "$(stuck)" "$before"
    # The aim is a second; an emulated machine on a busy one takes some, and only a gross failure fails a test.
    [ "$longest" -lt 20000 ] || fail "an upgrade held requests up for $longest ms"
done
is "I/O errors" "$(io_errors)" ""
ok "$kind: upgrades under load"

# A daemon that is slow but lives is waited for.
end_of_stop() { kill -CONT "$daemon"; }
kill -STOP "$daemon"
(sleep 5 && end_of_stop) &
since=$(uptime_ms)
dd if="$data" of=/dev/null bs=4k count=1 iflag=direct status=none || fail "a slow daemon was given up"
[ $(($(uptime_ms) - since)) -ge 4000 ] || fail "the daemon was not slow"
wait $!
is "the device" "$(node "$data")" "$name"
grep -q 'Connection timed out' "$kernel" && fail "the connection was cut"
ok "$kind: a daemon that answers nothing for 5 s is waited for"

# What was written last is there, byte by byte, below the device.
verified "$data" 24M 4711 --direct=1 || fail "fio: $(cat "$work/fio")"
detach
end TERM
verified "$work/data.img" 24M 4711 --verify_only=1 || fail "the backing: $(cat "$work/fio")"
ok "$kind: the backing holds what was written last"
