"""Frames forecast per second, beside statsmodels, scikit-learn and deeptime doing the same.

Run with `python benchmarks/forecast.py` (about a minute of one core). The task is the default of the book: C-alphas of
chignolin, history 5, lead 15, all windows of the test part. Training and forecasting are timed apart, as time on the
processor. A ratio above 1 means that foldbook is faster. `var` trains an autoregression of each coordinate, principal
axes and nine ridges where scikit-learn solves one; `arima` forecasts from all frames in one pass of the filter.
"""
import os
import time
import warnings

for name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[name] = '1'
import numpy as np

from foldbook import data
from foldbook.forecast import NETWORKS, forecaster
from foldbook.windows import forecasting_problem, read_positions

warnings.simplefilter('ignore')


def seconds(f, repeats=3):
    best = np.inf
    for _ in range(repeats):
        began = time.process_time()
        f()
        best = min(best, time.process_time() - began)
    return best


def flat(w):
    return w.past.reshape(len(w), w.history, -1).astype(float), w.future[:, 0].reshape(len(w), -1).astype(float)


def sklearn_ridge(p):
    from sklearn.linear_model import Ridge
    (x, y), (z, _) = flat(p.train), flat(p.test)
    x, z = x.reshape(len(x), -1), z.reshape(len(z), -1)
    model = Ridge(1e-3)
    return seconds(lambda: model.fit(x, y)), seconds(lambda: model.predict(z)), 'scikit-learn Ridge, all coordinates'


def statsmodels_var(p):
    "A VAR(5) of one step, iterated to the lead from every frame, as its forecast does."
    from statsmodels.tsa.api import VAR
    x = np.concatenate([s.reshape(len(s), -1) for s in p.train.series]).astype(float)
    model = VAR(x)
    fitted = model.fit(p.train.history, trend='c')
    past = flat(p.test)[0]
    few = 200
    train = seconds(lambda: model.fit(p.train.history, trend='c'))
    forecast = seconds(lambda: [fitted.forecast(h, p.test.lead) for h in past[:few]])
    return train, forecast*len(past)/few, 'statsmodels VAR, one frame at a time'


def statsmodels_arima(p):
    """ARMA(2,1) of each coordinate, its filter run on to each frame and its forecast asked for, for some frames of
    one coordinate."""
    from statsmodels.tsa.arima.model import ARIMA
    x, z = (s.series[0].reshape(len(s.series[0]), -1).astype(float) for s in (p.train, p.test))
    fit = lambda c: ARIMA(c - c.mean(), order=(2, 0, 1), trend='n').fit(method='innovations_mle')
    fitted, few = fit(x[:, 0]), 20
    forecast = lambda: [fitted.apply(z[:t + 1, 0]).forecast(p.test.lead) for t in range(100, 100 + few)]
    train, forecast = seconds(lambda: fit(x[:, 0]), 1), seconds(forecast, 1)
    return train*x.shape[1], forecast*len(p.test)/few*x.shape[1], 'statsmodels ARIMA, one frame at a time'


def deeptime_vamp(p):
    "The Koopman model of the same lag: coordinates of one frame to those of a later one."
    from deeptime.decomposition import EDMD
    from deeptime.basis import Identity
    (x, y), (z, _) = flat(p.train), flat(p.test)
    model = EDMD(Identity())
    fitted = model.fit((x[:, -1], y)).fetch_model()
    train = seconds(lambda: model.fit((x[:, -1], y)).fetch_model())
    return train, seconds(lambda: fitted.transform(z[:, -1])), 'deeptime EDMD, one frame read'


def main():
    d = data.fetch('cln025_implicit', progress=False)
    p = forecasting_problem(read_positions(d.trajectories, d.topology)[0], 15)
    n = len(p.test)
    ours = {}
    print(f'{"foldbook":<46}{"training / s":>13}{"frames/s":>12}')
    for name in ('shrink', 'ar', 'var', 'arima', 'ffn', 'gru', 'lstm', 'transformer', 'lstm_structure'):
        train = seconds(lambda name=name: forecaster(name).fit(p.train, p.validation), 1)
        model = forecaster(name, **(dict(max_epochs=1) if name in NETWORKS else {})).fit(p.train, p.validation)
        ours[name] = train, seconds(lambda model=model: model.predict(p.test))
        print(f'{name:<46}{train:>13.2f}{n/ours[name][1]:>12.0f}')
    print(f'{"peers":<46}{"training / s":>13}{"frames/s":>12}   foldbook is faster by')
    for peer, own in ((sklearn_ridge, 'var'), (statsmodels_var, 'var'), (statsmodels_arima, 'arima'),
                      (deeptime_vamp, 'shrink')):
        train, forecast, name = peer(p)
        print(f'{name:<46}{train:>13.2f}{n/forecast:>12.0f}   {own}: {train/ours[own][0]:.2g} x training, '
              f'{forecast/ours[own][1]:.2g} x forecasting')


if __name__ == '__main__': main()
