cd /tmp/w/11
export PYTHONPATH=/tmp/w/11:/tmp/w/11/tests OMP_NUM_THREADS=1 FSP_PROGRESS=0
nohup nice -n 0 /work/main/.venv/bin/python -m fsp.compendium.reproduce --refresh --recompute --only 11 > /tmp/w/scratch-11/full.log 2>&1 &
echo $! > /tmp/w/scratch-11/full.pid
