# What a job script does before its srun: ". launch/job.sh". From then on the job is queued again when it ends
#   with 75               the run has saved and asks for it: a time limit, a pre-emption
#   with 69, 129 to 192   a rank hung, a signal killed one; MSPT_RETRIES times at most, other reasons counted
# and not when it is done (0), when it says what is wrong (1, 2), or when SLURM itself ends it (scancel).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

queue_again() {
  local code=$?
  local again=
  case $code in
    0) return ;;
    75) again=1 ;;
    69 | 129 | 1[3-9]?) [ "${SLURM_RESTART_COUNT:-0}" -ge "${MSPT_RETRIES:-3}" ] || again=1 ;;
  esac
  if [ -n "$again" ] && [ -z "$told_to_end" ]; then
    echo "job $SLURM_JOB_ID ended with $code: queued again"
    trap '' TERM # it comes to this script and its children as soon as the job is queued
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "job $SLURM_JOB_ID ended with $code; the same command goes on where it stands"
  fi
}

told_to_end=
trap 'told_to_end=1' TERM
trap : USR1 # for the ranks
trap queue_again EXIT
