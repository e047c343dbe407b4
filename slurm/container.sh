# An image holds no scontrol, so this shell asks for the requeue, which sends TERM to the worker. On TERM it only waits,
# so that the job does not end before its worker.
trap 'scontrol requeue "$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"' USR1
trap : TERM
{command} &
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
exit $code
