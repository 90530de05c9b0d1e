//! Cost of the recorder's hot path: one record appended at an exit, and a group finished.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use ftvmm_devices::Input;
use ftvmm_replication::{Event, GroupEncoder, Ordinal, Record};

fn time(at: u64) -> Record {
    Record { at: Ordinal(at), event: Event::Input(Input::Time { now_ns: at * 11_000 }) }
}

fn append(criterion: &mut Criterion) {
    let mut encoder = GroupEncoder::new();
    let mut at = 0;
    criterion.bench_function("append a time record", |bencher| {
        bencher.iter(|| {
            at += 9;
            encoder.push(black_box(&time(at)));
            if encoder.body_bytes() > 3000 {
                black_box(encoder.finish(Ordinal(at)));
            }
        });
    });

    let frame = vec![0x5a; 1514];
    criterion.bench_function("append a full frame", |bencher| {
        bencher.iter_batched_ref(
            || {
                let event = Event::Input(Input::NetRx { frame: frame.clone() });
                (GroupEncoder::new(), Record { at: Ordinal(9), event })
            },
            |(encoder, record)| encoder.push(black_box(record)),
            BatchSize::SmallInput,
        );
    });

    let mut horizon = 0;
    let mut encoder = GroupEncoder::new();
    criterion.bench_function("finish a group of three records", |bencher| {
        bencher.iter(|| {
            (0..3).for_each(|step| encoder.push(&time(horizon + step)));
            horizon += 10;
            black_box(encoder.finish(Ordinal(horizon)));
        });
    });
}

criterion_group!(benches, append);
criterion_main!(benches);
