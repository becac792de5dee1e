#!/bin/sh
# Starts a Slurm of one node on this machine, for tests: munged, slurmctld, slurmd (Debian: apt-get install slurm-wlm munge).
# Needs root. State and logs are kept in $1 (default /tmp/slurm-test); `start.sh stop` ends the daemons.
set -e
if [ "$1" = stop ]; then
    pkill slurmd || true; pkill slurmctld || true; pkill munged || true
    exit 0
fi
state=${1:-/tmp/slurm-test}
host=$(hostname -s)
mkdir -p "$state/ctld" "$state/d" /etc/slurm /run/munge /var/lib/munge /var/log/munge
chown munge: /run/munge /var/lib/munge /var/log/munge
[ -f /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 2>/dev/null; }
chown munge: /etc/munge/munge.key && chmod 400 /etc/munge/munge.key
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=test
SlurmctldHost=$host
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=30
MinJobAge=600
JobRequeue=1
SchedulerParameters=sched_interval=2,bf_interval=2
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/d
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
NodeName=$host CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
pgrep munged > /dev/null || runuser -u munge -- munged
pgrep slurmctld > /dev/null || slurmctld
pgrep slurmd > /dev/null || slurmd
for _ in $(seq 30); do
    sinfo -h -o %T 2> /dev/null | grep -q idle && exit 0
    sleep 1
done
sinfo; tail -5 "$state"/*.log; exit 1
