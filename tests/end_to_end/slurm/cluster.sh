#!/usr/bin/env bash
# A real SLURM of several nodes (munged, slurmctld, a slurmd a node) on one machine, without systemd. Run as root.
#   cluster.sh install          the packages, by apt; starts no service
#   cluster.sh start | stop
#   cluster.sh kill-node I      kill -9 everything on node I, as a crash does
#   cluster.sh start-node I     bring it back
# Settings (environment):
#   CLUSTER_DIR   where all its files are, slurm.conf among them (SLURM_CONF of its clients); start wipes it
#   NODES=2       each of CPUS=4 and MEM=8000 MB, which may be more than there is
#   MODE=auto     what keeps nodes apart; the first that works here:
#                 netns  own address, host name and cable
#                 uts    own host name
#                 plain  nothing; /etc/hosts names them while it runs
# Partitions: main, and high, whose jobs pre-empt those in main.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
D=${CLUSTER_DIR:-/tmp/mspt-slurm}
[ ! -f "$D/settings" ] || [ "${1:-}" = start ] || . "$D/settings"
MODE=${MODE:-auto} NODES=${NODES:-2} CPUS=${CPUS:-4} MEM=${MEM:-8000}
SUBNET=10.77.0 BRIDGE=brslurm
export SLURM_CONF=$D/slurm.conf

say() { echo "cluster.sh: $*" >&2; }
controller() { [ "$MODE" = netns ] && echo "$SUBNET.254" || echo 127.0.0.1; }
address() { [ "$MODE" = netns ] && echo "$SUBNET.$((10 + $1))" || echo 127.0.0.1; }
wait_for() { # seconds, command…
  local end=$((SECONDS + $1))
  shift
  until "$@" > /dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { say "timed out: $*"; return 1; }
    sleep 0.1
  done
}

install_packages() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # The packages would start daemons of their own.
  local policy=/usr/sbin/policy-rc.d made=
  [ -e $policy ] || { made=1; printf '#!/bin/sh\nexit 101\n' > $policy; chmod +x $policy; }
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2 procps
  [ -z "$made" ] || rm -f $policy
}

choose_mode() {
  if ip netns add slurm-probe 2> /dev/null && ip link add vslp type veth peer name eth0 netns slurm-probe 2> /dev/null &&
    unshare --uts --mount true 2> /dev/null; then
    MODE=netns
  elif unshare --uts --mount sh -c "mount --bind /etc/hosts /etc/hosts" 2> /dev/null; then
    MODE=uts
  else
    MODE=plain
  fi
  ip link del vslp 2> /dev/null || true
  ip netns del slurm-probe 2> /dev/null || true
}

write_configuration() {
  local i
  cat > "$D/slurm.conf" << END
ClusterName=onemachine
SlurmctldHost=localhost($(controller))
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$D/munge/socket,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=5,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=5
MinJobAge=86400
CompleteWait=0
END
  for i in $(seq "$NODES"); do
    # NodeHostname=localhost: how SLURM is told that several slurmd share a host
    echo "NodeName=node$i $([ "$MODE" = netns ] || echo NodeHostname=localhost) NodeAddr=$(address "$i")" \
      "Port=$([ "$MODE" = netns ] && echo 16818 || echo $((17000 + i))) CPUs=$CPUS RealMemory=$MEM State=UNKNOWN"
  done >> "$D/slurm.conf"
  cat >> "$D/slurm.conf" << END
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 GraceTime=20 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=20 PreemptMode=OFF State=UP
END
  # Explicit, or slurmd refuses to start where no cgroup tree is mounted.
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$D/cgroup.conf"
  { echo "127.0.0.1 localhost"; for i in $(seq "$NODES"); do echo "$(address "$i") node$i"; done; } > "$D/hosts"
}

start_node() {
  local n=node$1
  mkdir -p "$D/spool/$n"
  local boot="mount --bind $D/hosts /etc/hosts && hostname $n && readlink /proc/self/ns/uts > $D/$n.uts && exec slurmd -b -N $n"
  case $MODE in
    netns) nsenter --net="/run/netns/slurm-$n" unshare --uts --mount --propagation private sh -c "$boot" ;;
    uts) unshare --uts --mount --propagation private sh -c "$boot" ;;
    plain) env CLUSTER_NODE="$D/$n" slurmd -b -N "$n" ;;
  esac
}

node_pids() { # every process of node I
  local p n=node$1 mine todo
  if [ -f "$D/$n.uts" ]; then
    mine=$(cat "$D/$n.uts")
    for p in /proc/[0-9]*; do [ "$(readlink "$p/ns/uts" 2> /dev/null)" != "$mine" ] || echo "${p#/proc/}"; done
  elif [ "$MODE" = plain ]; then # its daemons, by our mark, and all that come from them
    todo=$(for p in /proc/[0-9]*; do
      case $(cat "$p/comm" 2> /dev/null) in slurmd | slurmstepd)
        { tr '\0' '\n' < "$p/environ"; } 2> /dev/null | grep -qxF "CLUSTER_NODE=$D/$n" && echo "${p#/proc/}" ;;
      esac
    done || true)
    while [ -n "$todo" ]; do
      echo "$todo"
      todo=$(ps -o pid= --ppid "$(echo $todo | tr ' ' ,)" | tr -d ' ' || true)
    done
  fi
}

kill_node() {
  local p
  p=$(node_pids "$1")
  [ -z "$p" ] || kill -9 $p 2> /dev/null || true
  rm -f "$D/slurmd-node$1.pid" "$D/node$1.uts"
}

network_up() {
  local i
  ip link add "$BRIDGE" type bridge
  ip addr add "$SUBNET.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for i in $(seq "$NODES"); do
    ip netns add "slurm-node$i"
    ip link add "vsl$i" type veth peer name eth0 netns "slurm-node$i"
    ip link set "vsl$i" master "$BRIDGE" up
    ip -n "slurm-node$i" link set lo up
    ip -n "slurm-node$i" addr add "$(address "$i")/24" dev eth0
    ip -n "slurm-node$i" link set eth0 up
  done
}

network_down() {
  local n
  for n in $(ip netns list 2> /dev/null | awk '/^slurm-node/{print $1}'); do ip netns del "$n"; done
  # The kernel takes the cables down only some time after a namespace's last process.
  for n in $(ip -o link show type veth | sed -n 's/^[0-9]*: \(vsl[0-9]*\)@.*/\1/p'); do ip link del "$n" 2> /dev/null || true; done
  ip link del "$BRIDGE" 2> /dev/null || true
}

start() {
  [ "$(id -u)" = 0 ] || { say "run as root"; exit 1; }
  [ ! -f "$D/settings" ] || "$0" stop # with the settings that one was started with
  rm -rf "$D"
  mkdir -p "$D"/{state,spool,log,munge}
  chmod 755 "$D"
  [ "$MODE" != auto ] || choose_mode
  trap 'rc=$?; trap - EXIT; [ $rc = 0 ] || { tail -n 5 "$D"/log/* >&2; stop; }; exit $rc' EXIT
  declare -p MODE NODES CPUS MEM > "$D/settings"
  write_configuration
  case $MODE in
    netns) network_down; network_up ;;
    plain) for i in $(seq "$NODES"); do echo "127.0.0.1 node$i # cluster.sh"; done >> /etc/hosts ;;
  esac
  (umask 077; mungekey -c -k "$D/munge/key")
  munged --key-file="$D/munge/key" --socket="$D/munge/socket" --pid-file="$D/munge/pid" \
    --log-file="$D/log/munged.log" --seed-file="$D/munge/seed"
  wait_for 10 munge -S "$D/munge/socket" -n
  slurmctld
  wait_for 20 scontrol ping
  local i
  for i in $(seq "$NODES"); do start_node "$i"; done
  wait_for 30 sh -c "[ \$(sinfo -h -N -p main -t idle -o %N | wc -l) = $NODES ]"
  say "$(slurmctld -V), $NODES nodes, MODE=$MODE"
}

stop_daemon() { # its pid file
  local p
  [ -f "$1" ] || return 0
  p=$(cat "$1")
  kill "$p" 2> /dev/null || return 0
  wait_for 10 sh -c "! kill -0 $p || grep -q '^State:.Z' /proc/$p/status" || kill -9 "$p" 2> /dev/null || true
}

stop() {
  [ -f "$D/settings" ] || { say "not running"; return 0; }
  timeout 5 scancel --user=root 2> /dev/null || true
  local i
  for i in $(seq "$NODES"); do kill_node "$i"; done
  stop_daemon "$D/slurmctld.pid"
  stop_daemon "$D/munge/pid"
  case $MODE in
    netns) network_down ;;
    plain) sed '/# cluster.sh$/d' /etc/hosts > "$D/hosts.new"; cat "$D/hosts.new" > /etc/hosts ;;
  esac
  rm -f "$D/settings"
}

case ${1:-} in
  install) install_packages ;;
  start) start ;;
  stop) stop ;;
  kill-node) kill_node "$2" ;;
  start-node) start_node "$2" ;;
  *) sed -n '2,14s/^# \?//p' "$0"; exit 2 ;;
esac
