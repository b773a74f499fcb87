# How many tokens, and of which level: a fixed number of each level; one budget for both, by standardised importances
# (keep='joint'); a number per picture (keep='mass:0.5': on the mean 33 of 144 at P4 and 15 of 36 at P5 in a network of
# fixed k; see kept_p4 and kept_p5 in log.csv); and that mean, fixed.
#   python -m prepare.shapes --out=data/shapes_test --seed=1 --train=1 --val=500           test pictures
#   python bench.py experiment experiments/keep.py
name = 'keep'
train = 'config/shapes.py'
arms = (('a quarter of each level', "--k='(0,36,9)'"),
        ('one budget of as many', "--k='(0,36,9)' --keep=joint"),
        ('half of the importance', '--k=0.5 --keep=mass:0.5'),
        ('its mean, fixed', "--k='(0,33,15)'"))
test = 'data/shapes_test/val.json'
evaluate = '--occlusion=False'
