# An image holds no scontrol, so this shell passes the warning on, and asks for the requeue where the worker wants one
# (75). The worker's own would be refused: without the element's number it asks for none. On TERM this shell only waits,
# so that the job does not end before its worker.
trap 'warned=1 signalled=1; kill -USR1 $worker' USR1
trap signalled=1 TERM
env -u SLURM_ARRAY_TASK_ID {command} &
worker=$! signalled=1
while [ $signalled ]; do # a signal ends `wait`, not the worker
    signalled=
    wait $worker
    code=$?
done
[ $warned ] && [ $code = 75 ] && scontrol requeue "$SLURM_ARRAY_JOB_ID"_"$SLURM_ARRAY_TASK_ID"
exit $code
