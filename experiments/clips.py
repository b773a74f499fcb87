# Memory of earlier frames (memory='time') for plates whose class was seen two frames ago only: see prepare/clips.py.
# Without memory the last frame is all there is. The wider arm has 2.25 times the pixels, about what three frames cost.
#   python -m prepare.clips --out=data/clips_test --seed=1 --train=1 --val=500            test clips, never seen before
#   python bench.py experiment experiments/clips.py
name = 'clips'
train = 'config/clips.py'
arms = (('no memory', '--memory='),
        ('memory', '--memory=time'),
        ('shuffled memory', '--memory=time:shuffled'),
        ('wider map', '--memory= --imgsz=96'))
test = 'data/clips_test/val.json'
evaluate = '--occlusion=False'
