"Columns of numbers: every format, restarts, and what cannot be read."
import numpy as np
import pytest

from foldbook import series as fs


@pytest.mark.parametrize('text, why', [('', 'is empty'), ('1 2\n3 4 5\n', 'line 2 has 3 columns'),
                                       ('1\nnan?\n', 'line 2 cannot be read as numbers')])
def test_bad_tables_are_named(tmp_path, text, why):
    (tmp_path/'t.txt').write_text(text)
    with pytest.raises(ValueError, match=f't.txt: {why}'): fs.read_series(tmp_path/'t.txt')


def test_missing_numbers_are_named_where_columns_are_wanted(tmp_path):
    (tmp_path/'t.txt').write_text('1 2\n3\n5 6\n')
    with pytest.raises(ValueError, match='t.txt: row 2 of 3 has not 2 numbers'):
        fs.read_table(tmp_path/'t.txt', columns=2)
    with pytest.raises(ValueError, match='t.txt: has 2 columns, but 3 are wanted'):
        fs.read_table(tmp_path/'t.txt', columns=3)


def test_a_file_of_the_name_goes_before_a_column(tmp_path):
    (tmp_path/'q:2').write_text('7\n')
    np.save(tmp_path/'q.npy', np.arange(6.).reshape(3, 2))
    assert fs.read_series(tmp_path/'q:2') == [7.] and (fs.read_series(f'{tmp_path}/q.npy:1') == [0, 2, 4]).all()
    (tmp_path/'damaged.npy').write_bytes(b'no array')
    with pytest.raises(ValueError, match='damaged.npy: cannot be read'):
        fs.read_series(tmp_path/'damaged.npy')
