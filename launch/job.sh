# What a job script does before its srun: ". launch/job.sh". From then on the job is queued again when it ends
#   with 75             the run has saved and asks for it: a time limit, a pre-emption
#   with anything else  a rank was killed, lost the others or failed; MSPT_RETRIES times at most, counting every restart
# and not when it is done (0), when its settings are wrong (2), or when SLURM itself ends it (scancel). srun may end with
# the code of another rank, which it has killed, than of the one that ended first: so that one leaves its 2 or 75 in a
# file.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

export MSPT_ENDED=$PWD/.mspt-ended-$SLURM_JOB_ID
rm -f "$MSPT_ENDED"

queue_again() {
  local code=$? again=
  [ ! -s "$MSPT_ENDED" ] || code=$(cat "$MSPT_ENDED")
  rm -f "$MSPT_ENDED"
  case $code in
    0) return ;;
    2) ;;
    75) again=1 ;;
    *) [ "${SLURM_RESTART_COUNT:-0}" -ge "${MSPT_RETRIES:-3}" ] || again=1 ;;
  esac
  if [ -n "$again" ] && [ -z "$told_to_end" ]; then
    echo "job $SLURM_JOB_ID ended with $code: queued again"
    trap '' TERM # it comes to this script and its children as soon as the job is queued
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "job $SLURM_JOB_ID ended with $code; the same command goes on where it stands"
  fi
  exit "$code"
}

told_to_end=
trap 'told_to_end=1' TERM
trap : USR1 # for the ranks
trap queue_again EXIT
