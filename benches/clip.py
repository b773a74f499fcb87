"""
Which earlier frames does a detection look at? Clips of prepare/clips.py, frame by frame, and in red how much the P4
token at the most confident object (white) attends to every cell of every frame: .github/clips.png.

    python train.py config/clips.py
    python bench.py clip --weights=out/clips/best.pt --data=data/clips/val.json
"""
import os

import torch
from PIL import Image, ImageDraw

from attention import selecting
from configurator import InputError, configure
from data import load_image, to_tensor
from eval import load_model, open_data
from plots import draw_boxes, shade_cells

weights = 'out/clips/best.pt'    # trained with memory=time
data = 'data/clips/val.json'
clips: tuple = (0, 1, 2, 3)      # which clips of the set
zoom = 3                         # times as large as they are
out = os.path.join('.github', 'clips.png')


@torch.no_grad()
def look(model, frames):
    """
    Frames, PIL images of one clip, oldest first -> detections (n, 6) in the last frame; the P4 cell at the best one;
    that cell's attention to every cell of every frame, (F, h, w), oldest first.
    """
    state, cells, seen = None, [], {}
    hook = model.block4.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs))
    for frame in frames:
        maps, after = model.forward_frame(to_tensor(frame)[None] / 255, state)
        x, memory, some, chosen = seen['inputs']
        cells.append(chosen.cells[0])                                                 # (k,) that this frame's P4 took
        state = after
    hook.remove()
    (rows,) = model.postprocess(maps, conf=0.1)
    if not len(rows):
        raise InputError(f'{weights} finds nothing in the last frame of a clip: train it for longer')
    h, w = x.shape[2:]
    focus = int((rows[0, 1] + rows[0, 3]) // 32 * w + (rows[0, 0] + rows[0, 2]) // 32)
    selected, attention = selecting(model.block4).attention(x, memory, some, chosen)
    row = attention[0, :, (selected[0] - focus).abs().argmin()].mean(0)               # (k + T,) newest frame first
    heat = torch.zeros(len(frames), h * w)
    for part, frame in zip(row.split(len(selected[0])), range(len(frames) - 1, -1, -1), strict=True):
        heat[frame, cells[frame]] = part
    return rows.numpy(), focus, heat.unflatten(1, (h, w)).numpy()


def main():
    model = load_model(weights)
    if not model.frames or 'scale' in model.cfg.memory:
        raise InputError(f'{weights} has no memory of frames alone: train it with --memory=time')
    dataset = open_data(data, model.names, '', frames=model.frames)
    page = None
    for n, clip in enumerate(clips):
        frames = [load_image(file, tuple(dataset.sizes[clip])) for file in dataset.clip_files(clip)]
        rows, focus, heat = look(model, frames)
        for t, frame in enumerate(frames):
            big = frame.resize((frame.width * zoom, frame.height * zoom), Image.NEAREST)
            picture = shade_cells(big, 0.6 * heat[t] / heat.max(), (255, 40, 0))
            if t == len(frames) - 1:
                best = rows[rows[:, 4] >= 0.3][:2]
                picture = draw_boxes(picture, best[:, :4] * zoom, best[:, 5], model.names, best[:, 4])
                side = 16 * zoom
                x, y = focus % heat.shape[2] * side, focus // heat.shape[2] * side
                ImageDraw.Draw(picture).rectangle((x, y, x + side - 1, y + side - 1), outline='white', width=2)
            if page is None:
                wide, high = len(frames) * (picture.width + 4), picture.height + 8
                page = Image.new('RGB', (wide * min(2, len(clips)) + 8, high * -(-len(clips) // 2)), 'white')
            page.paste(picture, (n % 2 * (wide + 8) + t * (picture.width + 4), n // 2 * high))
        shares = ' '.join(f'{share:.2f}' for share in heat.sum((1, 2)))
        print(f'clip {clip}: share of attention per frame, oldest first: {shares}')
    page.save(out)
    print(f'-> {out}')


if __name__ == '__main__':
    configure(globals())
    main()
