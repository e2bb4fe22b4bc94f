"""Draw nbs/images/explore.gif, the slider of `ader.explore` as it moves: `python .ci/animation.py`.

One photograph, attacked by PGD with a growing ε: what a naturally trained network and a student of ADER+ see and predict."""
import io, matplotlib
from pathlib import Path
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from PIL import Image
from ader.explore import _attack_view
from ader.samples import sample_images, sample_net

TOP, PHOTO = Path(__file__).resolve().parent.parent, 8 # a ship that both predict, until the attack is strong enough
NETS = {'naturally trained': 'clean', 'distilled by ADER+': 'student'}
EPS = [k/255 for k in range(17)]

def frame(x, y, classes, views, eps):
    "The two networks at one ε, a row each, and the slider below."
    fig = plt.figure(figsize=(6.4, 3.9), dpi=100)
    grid = fig.add_gridspec(3, 4, height_ratios=(1, 1, 0.16), width_ratios=(1, 1, 1, 1.5), wspace=0.12,
                            hspace=0.14, left=0.05, right=0.9, top=0.92, bottom=0.08)
    for row,(name, (out, z)) in enumerate(views.items()):
        axs = [fig.add_subplot(grid[row,k]) for k in range(4)]
        axs[0].imshow(z.permute(1,2,0))
        axs[1].imshow((0.5 + (z - x)*255/32).clamp(0, 1).permute(1,2,0))
        axs[2].imshow(out.attention[0,0] if out.attention.ndim == 4 else out.attention[0])
        p = out.logits[0].softmax(0)
        k = int(p.argmax())
        axs[3].barh(classes, p, color=['#029e73' if i == y else '#d55e00' if i == k else '0.8' for i in range(len(p))])
        axs[3].set(xlim=(0, 1), xticks=[])
        axs[3].invert_yaxis()
        axs[3].tick_params(labelsize=6, length=0)
        axs[3].yaxis.tick_right()
        for ax in axs[:3]: ax.set(xticks=[], yticks=[])
        axs[0].set_ylabel(name, fontsize=8)
        axs[3].set_title(f'{classes[k]}, {p[k]:.0%}', fontsize=8, pad=2, color='#029e73' if k == y else '#d55e00')
        if row == 0:
            for ax,text in zip(axs, ('the image it sees', 'what the attack adds', 'attention map')): ax.set_title(text, fontsize=8, pad=3)
    ax = fig.add_subplot(grid[2,:])
    ax.plot([0, 1], [0, 0], c='0.8', lw=4, solid_capstyle='round')
    ax.plot(eps/EPS[-1], 0, 'o', c='#0173b2', ms=11)
    ax.set(xlim=(-0.03, 1.35), ylim=(-1, 1))
    ax.text(1.04, 0, f'ε = {eps*255:.0f}/255', va='center', fontsize=10)
    ax.axis('off')
    file = io.BytesIO()
    fig.savefig(file)
    plt.close(fig)
    return Image.open(file).convert('RGB')

def main():
    images, labels, classes = sample_images()
    x, y, nets = images[PHOTO], int(labels[PHOTO]), {k: sample_net(n) for k,n in NETS.items()}
    frames = [frame(x, y, classes, {k: _attack_view(net, x, y, e, 10, 'Linf') for k,net in nets.items()}, e) for e in EPS]
    palette = frames[-1].quantize(96)
    frames = [f.quantize(96, palette=palette, dither=Image.Dither.NONE) for f in frames]
    there_and_back = frames + frames[-2:0:-1]
    times = [1200 if f in (frames[0], frames[-1]) else 160 for f in there_and_back]
    out = TOP/'nbs'/'images'/'explore.gif'
    there_and_back[0].save(out, save_all=True, append_images=there_and_back[1:], duration=times, loop=0, optimize=True)
    print(f'{out.relative_to(TOP)}: {out.stat().st_size:,} bytes')

if __name__ == '__main__': main()
